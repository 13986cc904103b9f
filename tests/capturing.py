"""What the tests of the capture have in common."""

import torch
from models import Net
from oracle import flat_grad
from torch import nn

import rgd_ext

B = 6


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


def own_type(forward, **parts):
    """A `Net` of a type of its own, for `register_rule`."""
    return type("Own", (Net,), {})(forward, **parts)


def as_unit(model):
    rgd_ext.register_rule(type(model), rgd_ext.unit)


def less_the_mean(m, x):
    z = m.a(x).tanh()
    return m.b(z - z.mean(0))


def layers(**others):
    return {"body": nn.Linear(5, 4), "out": nn.Linear(4, 2), **others}


def raw_parameter():
    def forward(m, x):
        return m.out((m.body(x) + m.p.expand(x.shape[1], -1)).tanh()).mean(1)

    return own_type(forward, **layers(p=nn.Parameter(torch.randn(1, 4))))
