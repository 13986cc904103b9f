"""The weights on the samples that make their weighted sum the RGD direction, from a Gramian."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import trace_rounding
from .checks import check_dtype, check_gramian
from .library import LIBRARY, register_default, register_fake

LIBRARY.define("gram_moments(Tensor gram) -> (Tensor, Tensor, Tensor, Tensor)")


@register_fake("gram_moments")
def _(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alignments = gram.new_empty(gram.shape[0], dtype=torch.float64)
    squared, centred = alignments.new_empty(()), alignments.new_empty(gram.shape)
    return squared, alignments, torch.empty_like(alignments), centred


@register_default("gram_moments")
def default_gram_moments(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|g|^2, the alignments <g_i - g, g>, |g_i - g|^2 and the Gramian of g_i - g, in float64, from K = G G^T."""
    rows = gram.mean(1, dtype=torch.float64)
    mean = rows.mean()
    alignments = rows - mean
    centred = (gram - rows[:, None]).sub_(alignments)
    return mean.clamp(min=0), alignments, centred.diagonal().clamp(min=0), centred


def gram_moments(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of per-sample gradients from their Gramian, as `moments` has them from G; computed in float64.

    Args:
        gram: K = G G^T, shape (B, B), float64 or float32.

    Returns:
        |g|^2, a scalar; the alignments a_i = <g_i - g, g>, shape (B,); |g_i - g|^2, shape (B,); and the centred
        Gramian <g_i - g, g_j - g>, shape (B, B). All are in float64.

    Raises:
        ValueError, TypeError: as `largest_eigenvalue`.
    """
    check_gramian("gram", gram)
    return torch.ops.rgd_ext.gram_moments(gram)


LIBRARY.define(
    "sample_weights(Tensor squared_grad_norm, Tensor alignments, Tensor squared_norms, Tensor epsilon, float ulp)"
    " -> (Tensor, Tensor)"
)


@register_fake("sample_weights")
def _(
    squared_grad_norm: Tensor, alignments: Tensor, squared_norms: Tensor, epsilon: Tensor, ulp: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(epsilon), torch.empty_like(alignments)


@register_default("sample_weights")
def default_sample_weights(
    squared_grad_norm: Tensor, alignments: Tensor, squared_norms: Tensor, epsilon: Tensor, ulp: float
) -> tuple[Tensor, Tensor]:
    """epsilon, or 0 where D = 0 to rounding, and the weights of eq. (10)."""
    is_zero = squared_norms.mean() <= trace_rounding(squared_grad_norm, ulp)
    epsilon = torch.where(is_zero, 0, epsilon)
    return epsilon, weak_field_weights(alignments, epsilon)


def weak_field_weights(alignments: Tensor, epsilon: Tensor) -> Tensor:
    """w_i = (1 - epsilon a_i) / B, with which sum_i w_i g_i = (I - epsilon D) g, eq. (10)."""
    return (1 - epsilon * alignments) / alignments.shape[0]


def sample_weights(
    squared_grad_norm: Tensor, alignments: Tensor, squared_norms: Tensor, epsilon: Tensor, ulp: float
) -> tuple[Tensor, Tensor]:
    """The weights on the samples that make their weighted sum the RGD direction, eq. (10).

    Args:
        squared_grad_norm: |g|^2, a scalar; this and the next two are what `moments` and `gram_moments` give.
        alignments: a_i = <g_i - g, g>, shape (B,).
        squared_norms: |g_i - g|^2, shape (B,), with mean tr D.
        epsilon: a scalar.
        ulp: relative rounding error of the statistics.

    Returns:
        epsilon, or 0 where D = 0 to rounding (tr D at most 8 ulps of |g|^2, which is every |g_i|^2 then); and with it
        w_i = (1 - epsilon a_i) / B, shape (B,).

    Raises:
        ValueError: if shapes, dtypes or devices disagree.
        TypeError: for anything but float64 or float32.
    """
    if alignments.ndim != 1 or squared_norms.shape != alignments.shape or not alignments.numel():
        raise ValueError(
            f"alignments and squared_norms have shapes {tuple(alignments.shape)} and {tuple(squared_norms.shape)}: pass"
            " one of each per sample, (B,)"
        )
    for name, tensor in (("squared_grad_norm", squared_grad_norm), ("epsilon", epsilon)):
        if tensor.ndim:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: pass a scalar tensor")
    check_dtype("alignments", alignments)
    tensors = (alignments, squared_norms, squared_grad_norm, epsilon)
    if len({(t.dtype, t.device) for t in tensors}) > 1:
        raise ValueError(
            f"the statistics and epsilon are {[f'{t.dtype} on {t.device}' for t in tensors]}: convert them to one dtype"
            " on one device"
        )
    return torch.ops.rgd_ext.sample_weights(squared_grad_norm, alignments, squared_norms, epsilon, ulp)
