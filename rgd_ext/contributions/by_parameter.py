"""Contributions whose statistics are computed parameter by parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..gradients import Moments, PerSampleGradients, sum_of_moments, total
from .factor import moments_from_gram
from .ledger import Contributions


class ByParameter(PerSampleGradients):
    """The per-sample gradients of a ledger, of which the statistics of all are sums over the parameters.

    Args:
        contributions: a closed ledger, which is used up by this one.
    """

    def __init__(self, contributions: Contributions) -> None:
        self._batch_size = contributions.batch_size
        self._parts = contributions.split()
        self._moments: dict[nn.Parameter, Moments] = {}

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self._batch_size

    def moments_by_parameter(self) -> dict[nn.Parameter, Moments]:
        """The moments of each parameter, from which the statistics were computed; empty before."""
        return self._moments

    def mean(self) -> list[Tensor]:
        """g = mean_i g_i."""
        return [step for part in self._parts.values() for step in part.mean()]

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        return total([part.align([v]) for part, v in zip(self._parts.values(), vector, strict=True)])

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred."""
        grams = {parameter: part.gram() for parameter, part in self._parts.items()}
        self._moments = {p: Moments(*torch.ops.rgd_ext.gram_moments(gram)[:3]) for p, gram in grams.items()}
        return total([*grams.values()])

    def moments(self) -> Moments | None:
        """The statistics that need no Gramian; None where the Gramian costs no more."""
        if self._gram_is_free:
            return None
        self._moments = {parameter: _moments_of(part) for parameter, part in self._parts.items()}
        return sum_of_moments(self._moments.values())

    def moments_and_mean(self) -> tuple[Moments, list[Tensor]] | None:
        """`moments` and `mean`, in one read of tensors where that has the same bits."""
        if self._gram_is_free:
            return None
        mean: list[Tensor] = []
        for parameter, part in self._parts.items():
            found = part.moments_and_mean() or (_moments_of(part), part.mean())
            self._moments[parameter] = found[0]
            mean += found[1]
        return sum_of_moments(self._moments.values()), mean

    @property
    def _gram_is_free(self) -> bool:
        return all(part.gram_is_free for part in self._parts.values())

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i."""
        return [step for part in self._parts.values() for step in part.combine(weights)]


def _moments_of(part: Contributions) -> Moments:
    return part.moments() or moments_from_gram(part.gram())
