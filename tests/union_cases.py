"""What the tests of directions of several backwards have in common."""

import copy

import torch
from capturing import B, double, loss_of
from models import MODELS
from oracle import per_sample_gradients
from torch import nn


def other_loss(output):
    """A second loss of the same outputs."""
    return output.cos().mean() + output.square().sum()


def both_losses(output):
    """What backwards of `loss_of` and `other_loss` add up to."""
    return loss_of(output) + other_loss(output)


def batches():
    """Inputs of an MLP, of 3 and of 5 samples."""
    return [double(3, 6), double(5, 6)]


def total_of(output):
    """The loss of a batch, as a sum over its samples."""
    return loss_of(output) * len(output)


def union_of(model, parts):
    """G of all samples, whose loss is the sum of `total_of` over the parts."""
    return torch.cat([per_sample_gradients(model, total_of, [x]) / len(x) for x in parts]) * sum(map(len, parts))


def backwards(model, parts):
    """A backward of `total_of` for each part."""
    for x in parts:
        total_of(model(x)).backward()


def state(model, *optimizers):
    """Copies of the parameters, of their gradients and of the state of the optimizers."""
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()], grads, [copy.deepcopy(o.state_dict()) for o in optimizers]


def assert_same(now, before):
    """Two results of `state` are equal to the last bit."""
    torch.testing.assert_close(now, before, rtol=0, atol=0, allow_subclasses=False)


LAYERS = {
    "large convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3)), (8, 3, 20, 20)),
    "large sequences": (lambda: nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.LayerNorm(24)), (8, 50, 20)),
    "wide": (lambda: nn.Sequential(nn.Linear(20, 1200), nn.Tanh(), nn.Linear(1200, 3)), (8, 20)),
}


def model_and_input(name):
    """A model of the catalogue, or one with large layers, and its input, in float64."""
    if name in MODELS:
        build, sample = MODELS[name]
        (x,) = sample(B)
    else:
        build, shape = LAYERS[name]
        x = torch.randn(shape)
    return build().double(), x.double() if x.is_floating_point() else x
