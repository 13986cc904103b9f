"""Several calls before one backward, and calls of other methods than `forward`."""

import pytest
import torch
from capturing import B, captured_grad, double, loss_of
from models import mlp
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext


def test_positions_in_another_method_than_forward():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 3)

        def features(self, x):
            return self.head((self.tokens(x) + self.positions(torch.arange(x.shape[1]))).tanh())

        def forward(self, x):
            return self.features(x)

    model, x = Features().double(), torch.randint(9, (4, 5))
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"'positions'.*'tokens'.*into the forward"):
        model.features(x[:, :4])
    # What the message asks for is there already.
    assert_close(captured_grad(model, x), weak_field(per_sample_gradients(model, loss_of, [x])))


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


def test_several_calls_before_a_backward_and_accumulate():
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
