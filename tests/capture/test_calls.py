"""A model may be called several times before a backward, by other methods than `forward`, and part by part."""

import pytest
import torch
from capturing import B, assert_exact, double, loss_of
from models import Encoder, mlp
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext


def test_positions_in_another_method_than_forward_are_refused_where_they_may_be_the_batch():
    class Features(Encoder):
        def features(self, x):
            return super().forward(x).tanh()

        def forward(self, x):
            return self.features(x)

    model, x = Features().double(), torch.randint(11, (4, 5))
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"'positions'.*'tokens'.*into the forward"):
        model.features(x[:, :4])
    # What the message asks for is there already.
    assert_exact(model, x)


def test_functions_without_positions_are_no_positions():
    model = nn.ModuleDict({"label": nn.Embedding(9, 4), "body": nn.Linear(6, 4)}).double()
    x, y = double(6, 6), torch.tensor([0, 1, 2, 3, 4, 4])
    with rgd_ext.precondition(model) as handle:
        loss_of(model["body"](x) * model["label"](y)).backward()
    assert handle.stats.batch_size == 6


def test_single_samples_and_one_backward_name_accumulate():
    model = mlp()
    with rgd_ext.precondition(model) as handle:
        with pytest.warns(UserWarning, match=r"one sample each.*handle\.accumulate\(\)"):
            sum(loss_of(model(torch.randn(1, 6))) for _ in range(3)).backward()
        sum(loss_of(model(torch.randn(1, 6))) for _ in range(3)).backward()  # says it once
        with handle.accumulate():
            for _ in range(3):
                loss_of(model(torch.randn(1, 6))).backward()
        assert handle.stats.batch_size == 3


def test_several_calls_are_samples_of_their_own_in_accumulate_and_paired_in_one_backward():
    model, parts = mlp().double(), [double(B, 6), double(4, 6)]
    with rgd_ext.precondition(model) as handle, handle.accumulate():
        for x in parts:
            (len(x) * loss_of(model(x))).backward()
    union = torch.cat([per_sample_gradients(model, loss_of, [x]) * 10 for x in parts])
    assert_close(flat_grad(model), weak_field(union))
    model.zero_grad()
    with rgd_ext.precondition(model):
        (loss_of(model(parts[0])) + model(parts[0]).square().mean()).backward()
    both = per_sample_gradients(model, lambda out: loss_of(out) + out.square().mean(), parts[:1])
    assert_close(flat_grad(model), weak_field(both))


def test_a_submodule_called_from_outside_has_the_batch_of_its_own_input():
    model, x = nn.ModuleDict({"encoder": Encoder()}).double(), torch.randint(11, (6, 5))
    expected = weak_field(per_sample_gradients(model["encoder"], loss_of, [x]))
    with rgd_ext.precondition(model):
        loss_of(model["encoder"](x)).backward()
        assert_close(flat_grad(model), expected)
        with pytest.raises(ValueError, match=r"positions' got an input of shape \(6,\)"):
            model["encoder"](torch.randint(11, (6, 6)))
