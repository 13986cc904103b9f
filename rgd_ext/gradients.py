"""Per-sample gradients as a linear operator: the protocol, and the source that holds them as tensors."""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from . import ops
from .reference import accumulate_dtype


@runtime_checkable
class PerSampleGradients(Protocol):
    """The (B, d) matrix G of per-sample gradients g_i, which is never required to exist.

    Vectors of the parameter space are lists of tensors, one of shape (*param.shape) per parameter. A source may also
    have `scalars()`, its `Moments` without the Gramian, and `combine_with_norm(weights)`, which gives |w^T G|^2 too.
    """

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        ...

    def mean(self) -> list[Tensor]:
        """g = mean_i g_i."""
        ...

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        ...

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred."""
        ...

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i for weights of shape (B,)."""
        ...


# |g|^2, the centred alignments <g_i - g, g>, (B,), and the centred squared norms |g_i - g|^2, (B,).
Moments: TypeAlias = tuple[Tensor, Tensor, Tensor]


def squared_norm(vector: list[Tensor]) -> Tensor:
    """|v|^2 of a vector of the parameter space, in the accumulation dtype."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in vector:
        if tensor.is_sparse:
            tensor = tensor.coalesce().values()
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return total([torch.ops.rgd_ext.squared_norm(group) for group in groups.values()])


def combine_with_norm(grads: PerSampleGradients, weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """p = w^T G and |p|^2, which some sources know for less."""
    if hasattr(grads, "combine_with_norm"):
        return grads.combine_with_norm(weights)
    combination = grads.combine(weights)
    return combination, squared_norm(combination)


def total(parts: list[Tensor]) -> Tensor:
    """The sum of statistics that may come from several devices and accumulation dtypes."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part.to(result.device)
    return result


def moments_of(grads: list[Tensor]) -> Moments:
    """Moments of gradients held as (B, *shape) tensors, in one read of them."""
    return torch.ops.rgd_ext.scalar_moments(grads)


def aligned(grads: Tensor, vector: Tensor) -> Tensor:
    """<g_i, v> for g (B, *shape) and v (*shape), in the accumulation dtype."""
    dtype = accumulate_dtype(grads.dtype)
    return grads.flatten().view(grads.shape[0], -1).to(dtype) @ vector.flatten().to(dtype)


class DenseGradients:
    """Per-sample gradients held as (B, *param.shape) tensors, as torch.func.vmap(grad(...)) or Opacus give them.

    Args:
        grads: a (B, d) tensor or a sequence of (B, *shape) tensors.

    Raises:
        ValueError, TypeError: as `rgd_ext.ops.moments`.
    """

    def __init__(self, grads: ops.Tensors) -> None:
        self.grads = ops.checked_grads(grads)

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self.grads[0].shape[0]

    def mean(self) -> list[Tensor]:
        """g = mean_i g_i."""
        return ops.moments(self.grads)[0]

    def scalars(self) -> Moments:
        """|g|^2, the centred alignments and the centred squared norms, in one read of G."""
        return moments_of(self.grads)

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        return torch.stack([aligned(g, v) for g, v in zip(self.grads, vector, strict=True)]).sum(0)

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred."""
        return ops.gram(self.grads)

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i."""
        return ops.combine(self.grads, weights)

    def dense(self) -> list[Tensor]:
        """G as (B, *shape) tensors."""
        return self.grads
