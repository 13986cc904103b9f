"""What the kernels allocate for their results."""

from __future__ import annotations

from torch import Tensor

from ..linalg import accumulate_dtype


def empty_like_parameters(grads: list[Tensor]) -> list[Tensor]:
    """One (*shape) tensor for each (B, *shape) tensor of `grads`."""
    return [g.new_empty(g.shape[1:]) for g in grads]


def empty_statistic(grad: Tensor) -> Tensor:
    """One number for each sample of `grad`, (B,), in the accumulation dtype."""
    return grad.new_empty(grad.shape[0], dtype=accumulate_dtype(grad.dtype))


def empty_gramian(grad: Tensor) -> Tensor:
    """One number for each two samples of `grad`, (B, B), in the accumulation dtype."""
    return grad.new_empty((grad.shape[0], grad.shape[0]), dtype=accumulate_dtype(grad.dtype))


def like_parameters(vectors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """`vectors` in the shapes and dtypes of the parameters that `grads`, each (B, *shape), belong to."""
    return [v.reshape(g.shape[1:]).to(g.dtype) for v, g in zip(vectors, grads, strict=True)]
