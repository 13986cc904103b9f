"""A model with a batch, and the gradients of its samples from plain autograd, one sample at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.peers import sample_losses

# Vectors that an operator is multiplied with.
PROBES = 3


@dataclass(frozen=True)
class Problem:
    """A model, its inputs, and the labels of a cross-entropy.

    Attributes:
        model, x, y: the model maps x to logits, (B, classes) or (B, T, classes); y has the labels, (B,) or (B, T).
        reduction: of the loss, "mean" or "sum"; with more than one label per sample only "mean".
        batch_dim: where the samples are in x.
        autocast: whether forward and loss run in bfloat16.
        parts: of how many batches of equal size, with a backward each, this is the union.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    reduction: str = "mean"
    batch_dim: int = 0
    autocast: bool = False
    parts: int = 1

    def __len__(self) -> int:
        return len(self.y)

    def mode(self) -> AbstractContextManager:
        """Autocast, where the problem asks for it; forward and loss belong inside."""
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of each part."""
        return zip(self.x.chunk(self.parts, self.batch_dim), self.y.chunk(self.parts), strict=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch."""
        with self.mode():
            return F.cross_entropy(model(x).movedim(-1, 1), y, reduction=self.reduction)

    def losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The losses of the samples, (B,); a label of many counts as its share of the sample."""
        with self.mode():
            return sample_losses(model(x), y)

    def rows(self) -> Tensor:
        """G of shape (B, d): the gradient of the loss of each sample, which the model sees alone."""
        trained = self.trained()
        found = []
        for i in range(len(self)):
            loss = self.loss(self.model, self.x.narrow(self.batch_dim, i, 1), self.y[i : i + 1])
            found.append(flat(torch.autograd.grad(loss, trained, allow_unused=True), trained))
        return torch.stack(found)


def flat(parts: tuple[Tensor | None, ...] | list[Tensor], trained: list[nn.Parameter]) -> Tensor:
    """Tensors with the shapes of the parameters as one vector; zeros stand for None."""
    whole = [torch.zeros_like(p) if part is None else part for part, p in zip(parts, trained, strict=True)]
    return torch.cat([part.detach().reshape(-1) for part in whole])


def flat_rows(parts: list[Tensor]) -> Tensor:
    """(B, *shape) for each parameter as (B, d)."""
    return torch.cat([part.detach().flatten(1) for part in parts], 1)


def probes(trained: list[nn.Parameter]) -> Tensor:
    """Fixed random vectors, (d, PROBES)."""
    size = sum(p.numel() for p in trained)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, PROBES, generator=generator, dtype=torch.float64).to(trained[0].dtype)
