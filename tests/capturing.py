"""What the tests of the capture have in common."""

import torch
from oracle import flat_grad
from torch import nn

import rgd_ext


def loss_of(output):
    return output.sin().square().mean()


def captured_grad(model, *inputs, loss=loss_of, **options):
    with rgd_ext.precondition(model, **options):
        loss(model(*inputs)).backward()
    return flat_grad(model)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.gain
