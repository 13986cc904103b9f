"""Parameters that torch.nn.utils.parametrize computes from others match the oracle."""

import copy

import pytest
import torch
from capturing import B, as_unit, double, expected_direction, loss_of, own_type
from models import Net
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from torch import nn
from torch.nn.utils import parametrizations

import rgd_ext


def test_parametrisations_that_are_cached_match_the_oracle():
    def forward(m, x):
        with nn.utils.parametrize.cached():
            return m.head(m.body(m.body(x)))

    body = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
    model, x = Net(forward, body=body, head=nn.Linear(5, 2)).double(), double(B, 5)
    expected = expected_direction(model, x)
    with rgd_ext.precondition(model):
        for _ in range(2):
            model.zero_grad()
            loss_of(model(x)).backward()
            assert_close(flat_grad(model), expected)
        model.zero_grad()
        with nn.utils.parametrize.cached():
            loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected)


def test_what_a_capture_computes_is_cached_for_nobody_else():
    body = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
    model, x = nn.Sequential(body, nn.Tanh()), torch.randn(B, 5)
    expected = model(x)
    with rgd_ext.precondition(model) as handle, nn.utils.parametrize.cached():
        loss_of(model(x)).backward()
        with handle.paused():
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("is_unit", [False, True])
def test_spectral_norm_in_training_iterates_as_without_the_capture(is_unit):
    """Its power iterations are those of an ordinary forward, whether by layers or in a unit."""
    norm = parametrizations.spectral_norm(nn.Linear(4, 5))
    model, x = own_type(lambda m, x: m.b(m.a(x)), a=norm, b=nn.Linear(5, 3)).double(), double(B, 4)
    before = copy.deepcopy(model.state_dict())
    model(x)
    after = copy.deepcopy(model.state_dict())
    expected = weak_field(per_sample_gradients(model.eval(), loss_of, [x]))
    model.train().load_state_dict(before)
    if is_unit:
        as_unit(model)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    assert norm.parametrizations.weight[0].training


def test_spectral_norm_iterates_once_where_vmap_cannot_run_the_layer():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 if x.sum() > -1000 else 2)

    model, x = nn.Sequential(parametrizations.spectral_norm(Branching(4, 3))).double(), double(B, 4)
    plain = copy.deepcopy(model)
    plain(x)
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match="one sample after the other"):
        loss_of(model(x)).backward()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
