"""Forwards that run again in the backward, by torch.utils.checkpoint, give the same direction."""

import copy

import pytest
import torch
from capturing import B, captured_grad, double, parameter
from models import Encoder, Net, mlp
from oracle import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

N, M = 4, 6


def test_checkpointing_gives_the_same_direction():
    model, x = mlp().double(), double(5, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    body = Net(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=model)
    assert_close(captured_grad(body, x), expected)


def test_reentrant_checkpointing_is_refused():
    model = Net(lambda m, x: checkpoint(m.inner, x, use_reentrant=True), inner=mlp())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        captured_grad(model, torch.randn(5, 6, requires_grad=True))


def test_a_checkpointed_block_with_positions_gives_the_same_direction():
    encoder, x = Encoder().double(), torch.randint(11, (6, 5))
    expected = captured_grad(copy.deepcopy(encoder), x)
    model = Net(lambda m, x: checkpoint(m.encoder, x, use_reentrant=False), encoder=encoder)
    assert_close(captured_grad(model, x), expected)


def test_a_checkpoint_that_ends_with_a_unit_gives_the_same_direction():
    def forward(m, x):
        return m.c(checkpoint(lambda x: m.b(m.a(x)), x, use_reentrant=False) if m.is_checkpointed else m.b(m.a(x)))

    unit = Net(lambda m, x: x * m.w, w=parameter(N))
    model = Net(forward, a=nn.Linear(N, N), b=unit, c=nn.Linear(N, M)).double()
    x, model.is_checkpointed = double(B, N), False
    expected = captured_grad(copy.deepcopy(model), x)
    model.is_checkpointed = True
    assert_close(captured_grad(model, x), expected)
