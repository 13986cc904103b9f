"""Layers inside of a model, whose input carries a gradient, are recorded or left alone; most run from C++."""

import pytest
import torch
from capturing import assert_exact, behind, double, expected_direction, loss_of
from models import Net
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext


def test_layer_without_trainable_parameters_is_left_alone():
    model, x = behind(nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 3)), double(5, 4)
    expected = expected_direction(model, x)
    with rgd_ext.precondition(model):
        output = model(x)
        loss_of(output).backward()
    assert not any(p.requires_grad for p in model[2].parameters())
    assert_close(flat_grad(model), expected)


def test_layer_that_also_runs_without_gradients_matches_the_oracle():
    def forward(m, x):
        hidden = m.body(x).tanh()
        with torch.no_grad():
            m.target = m.head(hidden)
        return m.head(hidden)

    model = Net(forward, body=nn.Linear(4, 4), head=nn.Linear(4, 3))
    assert_exact(model, torch.randn(5, 4))
    assert not model.target.requires_grad


def test_forward_that_raises_leaves_parameters_trainable():
    model = behind(nn.Linear(3, 3))
    with rgd_ext.precondition(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(double(5, 4))
    assert all(p.requires_grad for p in model.parameters())
