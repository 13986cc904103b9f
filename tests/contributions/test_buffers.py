"""Contributions take the memory of the backward before, unless somebody still holds it."""

import torch
from capturing import loss_of
from torch import nn

import rgd_ext
from rgd_ext.contributions.buffers import Workspace


def test_memory_is_used_again_by_the_next_backward():
    workspace, like = Workspace(), torch.empty(0, dtype=torch.float32)
    one, two = workspace.empty((2, 3), like), workspace.empty((4,), like)
    assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()
    workspace.restart()
    again, larger = workspace.empty((6,), like), workspace.empty((5,), like)
    assert again.data_ptr() == one.data_ptr()
    assert larger.shape == (5,)
    assert larger.untyped_storage().nbytes() == 20


def test_collected_gradients_outlive_later_backwards():
    model, x = nn.Conv2d(3, 4, 3), torch.randn(5, 3, 6, 6)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(x)).backward()
        with handle.collect() as parts:
            loss_of(model(x)).backward()
        collected = {p: factor.dense() for p, factor in parts[0].factors()}
        before = {p: tensor.clone() for p, tensor in collected.items()}
        loss_of(model(2 * x)).backward()
    assert all(torch.equal(tensor, before[p]) for p, tensor in collected.items())
