"""The Gramian of per-sample gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import as_matrix
from .checks import Tensors, checked_grads
from .library import LIBRARY, register_default, register_fake
from .results import empty_gramian

LIBRARY.define("gram(Tensor[] grads) -> Tensor")


@register_fake("gram")
def _(grads: list[Tensor]) -> Tensor:
    return empty_gramian(grads[0])


@register_default("gram")
def default_gram(grads: list[Tensor]) -> Tensor:
    """K = G G^T, (B, B), not centred, exactly symmetric."""
    matrices = [as_matrix(g) for g in grads]
    product = torch.stack([m @ m.T for m in matrices]).sum(0)
    return (product + product.T) / 2


def gram(grads: Tensors) -> Tensor:
    """Gramian K = G G^T of the per-sample gradients, not centred.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).

    Returns:
        K of shape (B, B) in the accumulation dtype. Centred and divided by B it has the non-zero spectrum of D.

    Raises:
        ValueError, TypeError: as `moments`.
    """
    return torch.ops.rgd_ext.gram(checked_grads(grads))
