"""The diffusion matrix of per-sample gradients times vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import as_matrix
from .checks import Tensors, as_list, checked_grads
from .library import LIBRARY, register_default, register_fake

LIBRARY.define("diffusion_mv(Tensor[] grads, Tensor[] vectors) -> Tensor[]")


@register_fake("diffusion_mv")
def _(grads: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    return [v.new_empty(v.shape) for v in vectors]


@register_default("diffusion_mv")
def default_diffusion_mv(grads: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """D v = (1/B) sum_i <g_i - g, v> g_i, eq. (2), for one vector (*shape) or several (k, *shape)."""
    matrices = [as_matrix(g) for g in grads]
    number = vectors[0].shape[0] if vectors[0].ndim == grads[0].ndim else 1
    columns = [v.reshape(number, m.shape[1]).to(m.dtype).T for v, m in zip(vectors, matrices, strict=True)]
    products = torch.stack([m @ v for m, v in zip(matrices, columns, strict=True)]).sum(0)
    products = (products - products.mean(0)) / products.shape[0]  # (B, k)
    results = [products.T @ m for m in matrices]
    return [r.reshape(v.shape).to(v.dtype) for r, v in zip(results, vectors, strict=True)]


def diffusion_mv(grads: Tensors, vectors: Tensors) -> list[Tensor]:
    """Diffusion matrix times one or several vectors, D v = (1/B) sum_i <g_i - g, v> g_i: two reads of G.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).
        vectors: one tensor per tensor of `grads`, of shape (*shape) for one vector or (k, *shape) for k of them.

    Returns:
        A list of tensors of the shapes of `vectors`.

    Raises:
        ValueError, TypeError: as `moments`; ValueError if `vectors` does not match `grads` in number, shape, dtype
            or device.
    """
    tensors, directions = checked_grads(grads), as_list(vectors)
    _check_vectors(tensors, directions)
    return torch.ops.rgd_ext.diffusion_mv(tensors, directions)


def _check_vectors(grads: list[Tensor], vectors: list[Tensor]) -> None:
    if len(grads) != len(vectors):
        raise ValueError(f"grads has {len(grads)} tensors and vectors {len(vectors)}: pass one vector per tensor")
    leading = {v.shape[: v.ndim - g.ndim + 1] for g, v in zip(grads, vectors, strict=True)}
    if len(leading) > 1:
        raise ValueError(f"vectors disagree in number: their leading shapes are {sorted(map(tuple, leading))}")
    for index, (grad, vector) in enumerate(zip(grads, vectors, strict=True)):
        shape = tuple(grad.shape[1:])
        if vector.ndim not in (len(shape), len(shape) + 1) or vector.shape[vector.ndim - len(shape) :] != shape:
            raise ValueError(
                f"vectors[{index}] has shape {tuple(vector.shape)}: expected {shape} for one vector or (k, *{shape})"
                " for k of them"
            )
        if (vector.dtype, vector.device) != (grad.dtype, grad.device):
            raise ValueError(
                f"vectors[{index}] is {vector.dtype} on {vector.device} but grads[{index}] is {grad.dtype} on"
                f" {grad.device}: convert one to the other"
            )
