"""Weighted sums of per-sample gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import accumulate_dtype, as_matrix
from .checks import Tensors, check_weights, checked_grads
from .library import LIBRARY, register_default, register_fake
from .results import empty_like_parameters, like_parameters

LIBRARY.define("combine(Tensor[] grads, Tensor weights) -> Tensor[]")


@register_fake("combine")
def _(grads: list[Tensor], weights: Tensor) -> list[Tensor]:
    return empty_like_parameters(grads)


@register_default("combine")
def default_combine(grads: list[Tensor], weights: Tensor) -> list[Tensor]:
    """p = sum_i w_i g_i."""
    return like_parameters([weighted_sum(weights, as_matrix(g)) for g in grads], grads)


def weighted_sum(weights: Tensor, matrix: Tensor) -> Tensor:
    """sum_i w_i m_i over the rows m_i of a matrix."""
    return (weights[:, None] * matrix).sum(0)


def combine(grads: Tensors, weights: Tensor) -> list[Tensor]:
    """Weighted sum over samples, p = sum_i w_i g_i: the second read of G.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).
        weights: shape (B,); (1 - eps a_i) / B gives the RGD direction, eq. (10). Converted to the accumulation dtype.

    Returns:
        A list of (*shape) in the dtype of `grads`.

    Raises:
        ValueError, TypeError: as `moments`; ValueError if `weights` is not of shape (B,) on the device of `grads`.
    """
    tensors = checked_grads(grads)
    check_weights(weights, tensors[0])
    return torch.ops.rgd_ext.combine(tensors, weights.to(accumulate_dtype(tensors[0].dtype)))
