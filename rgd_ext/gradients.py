"""Per-sample gradients as a linear operator: the protocol, and the source that holds them as tensors."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from . import ops
from .reference import accumulate_dtype


@runtime_checkable
class PerSampleGradients(Protocol):
    """The (B, d) matrix G of per-sample gradients g_i, which is never required to exist.

    Vectors of the parameter space are lists of tensors, one of shape (*param.shape) per parameter.
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


def squared_norm(vector: list[Tensor]) -> Tensor:
    """|v|^2 of a vector of the parameter space, in the accumulation dtype."""
    norms = torch._foreach_norm(vector, dtype=accumulate_dtype(vector[0].dtype))
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()


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

    def scalars(self) -> tuple[Tensor, Tensor, Tensor]:
        """|g|^2, the centred alignments and the centred squared norms, in one read of G."""
        mean, alignments, squared_norms = ops.moments(self.grads)
        return squared_norm(mean), alignments, squared_norms

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        dtype = accumulate_dtype(self.grads[0].dtype)
        pairs = zip(self.grads, vector, strict=True)
        products = [g.reshape(self.batch_size, -1).to(dtype) @ v.reshape(-1).to(dtype) for g, v in pairs]
        return torch.stack(products).sum(0)

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred."""
        return ops.gram(self.grads)

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i."""
        return ops.combine(self.grads, weights)

    def dense(self) -> list[Tensor]:
        """G as (B, *shape) tensors."""
        return self.grads
