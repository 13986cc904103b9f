"""The RGD direction for a known epsilon."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..linalg import accumulate_dtype
from .checks import Tensors, checked_grads
from .combine import default_combine
from .library import LIBRARY, register_default, register_fake
from .moments import default_moments
from .results import empty_like_parameters
from .weights import weak_field_weights

LIBRARY.define("precondition(Tensor[] grads, Tensor epsilon) -> Tensor[]")


@register_fake("precondition")
def _(grads: list[Tensor], epsilon: Tensor) -> list[Tensor]:
    return empty_like_parameters(grads)


@register_default("precondition")
def default_precondition(grads: list[Tensor], epsilon: Tensor) -> list[Tensor]:
    """(I - eps D) g, eq. (10), as a combination."""
    _, alignments, _ = default_moments(grads)
    return default_combine(grads, weak_field_weights(alignments, epsilon))


def precondition(grads: Tensors, epsilon: float | Tensor) -> list[Tensor]:
    """RGD direction for a known epsilon, (I - eps D) g, eq. (10), in two reads of G.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).
        epsilon: a number, or a one-element tensor on the device of `grads` (no synchronisation). The caller answers
            for eps < 1 / lambda_max(D), eq. (6); `rgd_ext.direction` chooses it.

    Returns:
        A list of (*shape) in the dtype of `grads`.

    Raises:
        ValueError, TypeError: as `moments`; ValueError for a number that is not finite or a tensor that is not a
            scalar on the device of `grads`.
    """
    tensors = checked_grads(grads)
    return torch.ops.rgd_ext.precondition(tensors, _checked_epsilon(epsilon, tensors[0]))


def _checked_epsilon(epsilon: float | Tensor, grad: Tensor) -> Tensor:
    dtype = accumulate_dtype(grad.dtype)
    if not isinstance(epsilon, Tensor):
        if not math.isfinite(epsilon):
            raise ValueError(f"epsilon is {epsilon}: pass a finite number")
        return torch.full((), epsilon, dtype=dtype, device=grad.device)
    if epsilon.numel() != 1 or epsilon.device != grad.device:
        raise ValueError(
            f"epsilon has shape {tuple(epsilon.shape)} on {epsilon.device}: pass a number or a scalar on {grad.device}"
        )
    return epsilon.reshape(()).to(dtype)
