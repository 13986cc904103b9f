"""Functions and data to fit: problems of least squares, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

# Of a model and the inputs of a batch: the residuals of its samples, (B,) or (B, k).
Residual = Callable[..., Tensor]


@dataclass(frozen=True)
class Batch:
    """Samples, which lie along dimension 0 of `inputs`, and the function that gives their residuals.

    `by_transforms` gives the same residuals without torch.autograd.grad, for methods that transform it by torch.func.
    """

    residual: Residual
    inputs: tuple[Tensor, ...]
    by_transforms: Residual | None = None


@dataclass(frozen=True)
class Problem:
    """Least squares: the residuals of all batches, for an MLP with layers of these sizes.

    `solution_error` is the root mean square error at fresh points, for equations whose solution is known.
    """

    sizes: tuple[int, ...]
    batches: tuple[Batch, ...]
    solution_error: Callable[[nn.Module], float] | None = None

    def network(self) -> nn.Module:
        return mlp(*self.sizes).to(self.batches[0].inputs[0].device)

    def residuals(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The residuals of all samples, batch by batch."""
        return tuple(batch.residual(model, *batch.inputs) for batch in self.batches)

    def drawn(self, size: int | None) -> Problem:
        """The same problem on `size` random samples of its only batch; on all without a size."""
        if size is None:
            return self
        (batch,) = self.batches
        index = torch.randperm(len(batch.inputs[0]), device=batch.inputs[0].device)[:size]
        return replace(self, batches=(replace(batch, inputs=tuple(each[index] for each in batch.inputs)),))

    def error(self, model: nn.Module) -> float:
        """The mean squared residual over all samples; infinite for a model that has diverged."""
        error = mean_square(self.residuals(model)).item()
        return error if math.isfinite(error) else math.inf


def mean_square(residuals: tuple[Tensor, ...]) -> Tensor:
    return (torch.cat(residuals) if len(residuals) > 1 else residuals[0]).square().mean()


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes in float64, with tanh between them."""
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair, dtype=torch.float64), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def difference(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x) - y


def uniform(count: int, dimensions: int) -> Tensor:
    """Random points in the unit cube."""
    return torch.rand(count, dimensions, dtype=torch.float64)


def one_dimension() -> Problem:
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    y = torch.sin(10 * x) + 0.3 * torch.sin(30 * x)
    return Problem((1, 64, 64, 1), (Batch(difference, (x, y)),))


def two_dimensions() -> Problem:
    x = 2 * uniform(512, 2) - 1
    y = torch.sin(math.pi * (x[:, :1] + x[:, 1:] ** 2)) * torch.exp(-x.square().sum(1, keepdim=True))
    return Problem((2, 32, 32, 1), (Batch(difference, (x, y)),))


def diabetes() -> Problem:
    """Noisy measurements: the fit of 193 weights to 442 patients leaves a residual."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x, y = (torch.tensor(part, dtype=torch.float64) for part in (data.data, data.target[:, None]))
    x, y = ((part - part.mean(0)) / part.std(0) for part in (x, y))
    return Problem((10, 16, 1), (Batch(difference, (x, y)),))


def autoencoder() -> Problem:
    """1,797 images of 8 x 8 pixels between 0 and 1."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data / 16, dtype=torch.float64)
    return Problem((64, 32, 8, 32, 64), (Batch(difference, (images, images)),))
