"""Small models of vectors and images as people write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES, WIDTH, INPUTS = 3, 8, 6


def mlp(activation: nn.Module | None = None) -> nn.Module:
    """Of vectors (B, INPUTS)."""
    first = nn.Linear(INPUTS, WIDTH), activation or nn.Tanh()
    return nn.Sequential(*first, nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))


def convolutions(norm: nn.Module) -> nn.Module:
    """Of images (B, 1, 6, 6)."""
    after = nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, CLASSES)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm, *after)


def weight_norm() -> nn.Module:
    """An MLP with torch's weight normalisation."""
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    return model


def frozen() -> nn.Module:
    """A trained layer on each side of one that is not trained."""
    model = mlp()
    model[2].requires_grad_(False)
    return model


class Head(nn.Module):
    """A model with a linear layer behind everything else."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, classes)


class Vectors(Head):
    """A layer in front of the head, of vectors (..., INPUTS)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))


class Twice(Vectors):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(self.hidden(x))))))


class Product(Vectors):
    """A raw parameter in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x) @ self.weight))


class Quadratic(nn.Module):
    """A layer that no package can know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a) * (x @ self.b).square() + x


class Checkpointed(Head):
    """A body that is computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Centred(Vectors):
    """A hidden layer from which its mean over the batch is subtracted."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.head(torch.tanh(hidden - hidden.mean(0)))


class Experts(Vectors):
    """Experts that each compute the samples that are sent to them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        share, chosen = self.router(hidden).softmax(-1).max(-1)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            sent = chosen == number
            out[sent] = expert(hidden[sent])
        return self.head(out * share.unsqueeze(-1))
