"""The models that several processes train in tests, and the parts of their batches."""

import torch
from models import MODELS, Net, images, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

# The parts of a batch, in samples, of two and of four processes.
EVEN, UNEVEN = {2: (4, 4), 4: (2, 2, 2, 2)}, {2: (2, 5), 4: (3, 1, 4, 2)}


def with_frozen_layer():
    """An MLP whose first bias is frozen."""
    model = mlp()
    model[0].bias.requires_grad_(False)
    return model


def tied():
    """A model that uses a weight twice."""
    model = Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.b.weight = model.a.weight
    return model


def two_heads():
    """A model whose batches use one of two heads, by the sign of their first element, and never the third."""

    def forward(m, x):
        head = m.left if x.numel() and x[0, 0] > 0 else m.right
        return head(m.body(x).tanh())

    parts = {name: nn.Linear(8, 3) for name in ("left", "right", "never")}
    return Net(forward, body=nn.Linear(6, 8), **parts)


def signed(batch):
    """Batches for `two_heads`: in the first part the first element of all samples is positive."""
    x = torch.randn(batch, 6)
    x[:2, 0], x[2:, 0] = 1.0, -1.0
    return (x,)


def with_large_layers():
    """A model of layers whose parameters are exchanged early; the middle one is used again and again."""

    def forward(m, x):
        for _ in range(m.times):
            x = m.b(x).tanh()
        return m.c(m.a(x).tanh())

    model = Net(forward, a=nn.Linear(140, 140), b=nn.Linear(140, 140), c=nn.Linear(140, 3))
    model.times = 1
    return model


def checkpointed():
    """A model whose middle runs again in the backward."""

    def forward(m, x):
        return m.c(checkpoint(m.b, m.a(x), use_reentrant=False).tanh())

    middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    return Net(forward, a=nn.Linear(6, 8), b=middle, c=nn.Linear(8, 3))


def with_batch_norm():
    """A convolution and batch normalisation."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def vectors(batch):
    """Inputs of an MLP."""
    return (torch.randn(batch, 6),)


CASES = {name: case for name, case in MODELS.items() if name != "siamese"} | {
    "frozen": (with_frozen_layer, vectors),
    "tied": (tied, vectors),
    "two heads": (two_heads, signed),
    "large": (with_large_layers, lambda batch: (torch.randn(batch, 140),)),
    "checkpointed": (checkpointed, vectors),
    "batch norm": (with_batch_norm, images),
}


def model_of(name, seed, dtype=torch.float64):
    """A model with parameters of this seed."""
    torch.manual_seed(seed)
    return CASES[name][0]().to(dtype)


def parts_of(name, sizes, dtype=torch.float64):
    """The parts of a batch."""
    torch.manual_seed(99)
    (x,) = CASES[name][1](sum(sizes))
    return [part.to(dtype) if part.is_floating_point() else part for part in x.split(sizes)]
