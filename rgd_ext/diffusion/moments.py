"""The mean and the spread of the gradients of all batches, accumulated in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..gradients import PerSampleGradients
from ..metric import statistics
from .sources import Source, State
from .vectors import flat


class PooledMoments(NamedTuple):
    """Moments of all samples of a source.

    Attributes:
        samples: N.
        mean: g, (d,).
        scatter: sum_i |g_i - g|^2.
        largest: the largest |g_i|^2.
    """

    samples: int
    mean: Tensor
    scatter: Tensor
    largest: Tensor


def pooled_moments(source: Source) -> PooledMoments:
    """The moments of all samples of `source`, by one pass."""
    zeros = source.space.zeros
    state = {"count": zeros(), "mean": zeros(source.space.dimension), "scatter": zeros(), "largest": zeros()}
    state = source.fold("moments", state, _merge)
    return PooledMoments(int(state["count"]), state["mean"], state["scatter"], state["largest"])


def _merge(state: State, grads: PerSampleGradients) -> None:
    """Make `state` the moments of the union of two sets of samples (Chan, Golub and LeVeque, 1983)."""
    stats = statistics(grads, with_gram=False)
    total = state["count"] + grads.batch_size
    delta = flat(grads.mean()) - state["mean"]
    state["scatter"] += stats.squared_norms.sum(dtype=torch.float64)
    state["scatter"] += delta.square().sum() * state["count"] * grads.batch_size / total
    state["mean"] += delta * grads.batch_size / total
    # |g_i|^2 = |g_i - g|^2 + 2 <g_i - g, g> + |g|^2 with the mean g of the batch.
    largest = stats.squared_norms.add(stats.alignments, alpha=2).max() + stats.grad_norm.square()
    torch.maximum(state["largest"], largest.double(), out=state["largest"])
    state["count"].copy_(total)
