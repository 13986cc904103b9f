"""The mean of per-sample gradients, and how far each of them is from it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import accumulate_dtype, as_matrix
from .checks import Tensors, checked_grads
from .combine import weighted_sum
from .gram import default_gram
from .library import LIBRARY, register_default, register_fake
from .results import empty_like_parameters, empty_statistic, like_parameters

LIBRARY.define("moments(Tensor[] grads) -> (Tensor[], Tensor, Tensor)")


@register_fake("moments")
def _(grads: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    return empty_like_parameters(grads), empty_statistic(grads[0]), empty_statistic(grads[0])


@register_default("moments")
def default_moments(grads: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """g = mean_i g_i, the alignments <g_i - g, g>, and the squared norms |g_i - g|^2."""
    matrices = [as_matrix(g) for g in grads]
    means = [_mean(m) for m in matrices]
    alignments = torch.stack([(m - g) @ g for m, g in zip(matrices, means, strict=True)]).sum(0)
    squared_norms = torch.stack([(m - g).square().sum(1) for m, g in zip(matrices, means, strict=True)]).sum(0)
    return like_parameters(means, grads), alignments, squared_norms


def _mean(matrix: Tensor) -> Tensor:
    # As a weighted sum, so that combine() with equal weights gives the same bits.
    batch_size = matrix.shape[0]
    return weighted_sum(matrix.new_full((batch_size,), 1 / batch_size), matrix)


def moments(grads: Tensors) -> tuple[list[Tensor], Tensor, Tensor]:
    """Mean, centred alignments and centred squared norms: one read of G.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).

    Returns:
        g = mean_i g_i, a list of (*shape) in the dtype of `grads`; the alignments a_i = <g_i - g, g>, shape (B,),
        which sum to zero; and |g_i - g|^2, shape (B,), whose mean is the trace of D. Both in the accumulation dtype.

    Raises:
        ValueError: for an empty list or batch, a scalar, batch sizes or devices that disagree.
        TypeError: for anything but floating-point tensors of one dtype.
    """
    return torch.ops.rgd_ext.moments(checked_grads(grads))


LIBRARY.define("scalar_moments(Tensor[] grads) -> (Tensor, Tensor, Tensor)")


@register_fake("scalar_moments")
def _(grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    statistic = empty_statistic(grads[0])
    return statistic.new_empty(()), statistic, torch.empty_like(statistic)


@register_default("scalar_moments")
def default_scalar_moments(grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """|g|^2, and the alignments and squared norms that `moments` gives."""
    means, alignments, squared_norms = default_moments(grads)
    return default_squared_norm(means), alignments, squared_norms


def scalar_moments(grads: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """|g|^2, and the alignments and squared norms of `moments`, without writing the mean.

    Raises:
        ValueError, TypeError: as `moments`.
    """
    return torch.ops.rgd_ext.scalar_moments(checked_grads(grads))


LIBRARY.define("squared_norm(Tensor[] vector) -> Tensor")


@register_fake("squared_norm")
def _(vector: list[Tensor]) -> Tensor:
    return vector[0].new_empty((), dtype=accumulate_dtype(vector[0].dtype))


@register_default("squared_norm")
def default_squared_norm(vector: list[Tensor]) -> Tensor:
    """|v|^2, as the Gramian of one sample: torch's norm of many numbers has fewer digits."""
    return default_gram([v.unsqueeze(0) for v in vector]).view(())
