"""The mean and the covariance of the per-sample gradients of a batch, and those of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rgd_ext

from ..data import Samples

FRACTION = 0.5  # epsilon is so many times 1 / lambda_max(D), as in the default of `RGD`
CHUNK = 1000  # samples of a batch in the passes over the data set


@dataclass(frozen=True, eq=False)
class Moments:
    """Of the gradients of the samples' losses.

    Attributes:
        gradient: their mean, (d,), in the order of `model.parameters()`.
        matrix: their covariance D.
    """

    gradient: Tensor
    matrix: rgd_ext.DiffusionMatrix

    @cached_property
    def largest_eigenvalue(self) -> float:
        """lambda_max(D)."""
        return self.matrix.largest_eigenvalue().item()

    @cached_property
    def trace(self) -> float:
        """tr D."""
        return self.matrix.trace().item()

    def correction(self, vector: Tensor) -> Tensor:
        """eps D v with eps = `FRACTION` / lambda_max(D), (d,)."""
        return FRACTION / self.largest_eigenvalue * (self.matrix @ vector)


def of_batch(model: nn.Module, samples: Samples) -> Moments:
    """Those of a batch."""
    matrix = rgd_ext.DiffusionMatrix.from_batch(model, cross_entropy, samples.inputs, samples.labels)
    return Moments(gradient(model, samples), matrix)


def of_data_set(model: nn.Module, samples: Samples) -> Moments:
    """Those of a data set; they are computed before the weights of the model change."""
    loader = list(zip(samples.inputs.split(CHUNK), samples.labels.split(CHUNK), strict=True))
    return Moments(gradient(model, samples), rgd_ext.DiffusionMatrix.from_dataset(model, cross_entropy, loader))


def gradient(model: nn.Module, samples: Samples) -> Tensor:
    """That of the mean loss, (d,)."""
    loss = cross_entropy(model(samples.inputs), samples.labels)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
