"""Per-sample gradients as a linear operator: the interface, and the source that holds them as tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import ops
from .linalg import accumulate_dtype


class Moments(NamedTuple):
    """The statistics of a batch that need no Gramian. With g_i the per-sample gradients and g their mean:

    Attributes:
        squared_grad_norm: |g|^2, a scalar.
        alignments: <g_i - g, g>, shape (B,).
        squared_norms: |g_i - g|^2, shape (B,).
    """

    squared_grad_norm: Tensor
    alignments: Tensor
    squared_norms: Tensor


class PerSampleGradients(ABC):
    """The (B, d) matrix G of per-sample gradients g_i, which is never required to exist.

    Vectors of the parameter space are lists of tensors, one of shape (*param.shape) per parameter. A class need not
    inherit from this one: any object with `batch_size`, `mean`, `align`, `gram` and `combine` is accepted in its place,
    and `isinstance` recognises it. A class that inherits can also override the methods that have a default here, with
    what it knows at a lower price.
    """

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """B, the number of samples."""

    @abstractmethod
    def mean(self) -> list[Tensor]:
        """g = mean_i g_i."""

    @abstractmethod
    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""

    @abstractmethod
    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred."""

    @abstractmethod
    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i for weights of shape (B,), which may be in a wider dtype than the gradients."""

    def moments(self) -> Moments | None:
        """The statistics that need no Gramian; None, the default, where they are best computed from the Gramian."""
        return None

    def moments_and_mean(self) -> tuple[Moments, list[Tensor]] | None:
        """`moments`, and g with the bits of `combine` with equal weights; None, the default, if not in fewer reads."""
        return None

    def combine_with_norm(self, weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """p = w^T G and |p|^2."""
        combination = self.combine(weights)
        return combination, squared_norm(combination)

    def largest_eigenvalue(self, method: Literal["lanczos", "bound"]) -> Tensor | None:
        """lambda_max(D), or a bound of it; None, the default, where it is best computed from the Gramian.

        For sources whose samples are in several processes, which do without the Gramian; so is `agreed`.
        """
        return None

    def sample_norms(self) -> Tensor | None:
        """|g_i|, (B,), as exact as from the Gramian; None, the default, where they are best read from it.

        For sources whose samples are in several processes.
        """
        return None

    def agreed(self, weights: Tensor, epsilon: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weights and the epsilon that have been chosen, or those that another process has chosen."""
        return weights, epsilon

    def dense(self) -> list[Tensor] | None:
        """G as (B, *param.shape) tensors; None, the default, where only single rows can be formed, by `combine`."""
        return None

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        if cls is not PerSampleGradients:
            return NotImplemented
        # An instance may have its batch_size as an ordinary attribute, which its class does not know.
        names = {name for base in other.__mro__ for name in vars(base)}
        return True if names >= {"mean", "align", "gram", "combine"} else NotImplemented


class _Adapter(PerSampleGradients):
    """A source whose class does not inherit from `PerSampleGradients`, with the defaults of that class."""

    def __init__(self, source: PerSampleGradients) -> None:
        self._source = source

    @property
    def batch_size(self) -> int:
        return self._source.batch_size

    def mean(self) -> list[Tensor]:
        return self._source.mean()

    def align(self, vector: list[Tensor]) -> Tensor:
        return self._source.align(vector)

    def gram(self) -> Tensor:
        return self._source.gram()

    def combine(self, weights: Tensor) -> list[Tensor]:
        return self._source.combine(weights)


def adapted(source: PerSampleGradients) -> PerSampleGradients:
    """`source`, wrapped if its class has the required methods without inheriting, so that it has all methods."""
    return source if PerSampleGradients in type(source).__mro__ else _Adapter(source)


class DenseGradients(PerSampleGradients):
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

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        return torch.stack([aligned(g, v) for g, v in zip(self.grads, vector, strict=True)]).sum(0)

    def align_with(self, vectors: ops.Tensors | Mapping[str, Tensor]) -> Tensor:
        """`align` with a vector that a user passes, one tensor (*shape) for each of `grads`.

        Raises:
            ValueError, TypeError: if it does not match `grads` in number, shape, dtype or device, or is a dict.
        """
        if isinstance(vectors, Mapping):
            raise TypeError("vectors is a dict, and these gradients have no names: pass a tensor for each of grads")
        tensors = ops.as_list(vectors)
        if len(tensors) != len(self.grads):
            raise ValueError(f"vectors has {len(tensors)} tensors and grads {len(self.grads)}: pass one for each")
        for index, (vector, grad) in enumerate(zip(tensors, self.grads, strict=True)):
            ops.check_vector(f"vectors[{index}]", vector, grad.shape[1:], grad)
        return self.align(tensors)

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred."""
        return ops.gram(self.grads)

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i."""
        return ops.combine(self.grads, weights)

    def moments(self) -> Moments:
        """The statistics that need no Gramian, in one read of G."""
        return moments_of(self.grads)

    def dense(self) -> list[Tensor]:
        """G as (B, *param.shape) tensors."""
        return self.grads


def moments_of(grads: list[Tensor]) -> Moments:
    """The moments of gradients held as (B, *shape) tensors, in one read of them."""
    return Moments(*torch.ops.rgd_ext.scalar_moments(grads))


def aligned(grads: Tensor, vector: Tensor) -> Tensor:
    """<g_i, v> for g (B, *shape) and v (*shape), in the accumulation dtype."""
    dtype = accumulate_dtype(grads.dtype)
    return grads.flatten().view(grads.shape[0], -1).to(dtype) @ vector.flatten().to(dtype)


def squared_norm(vector: list[Tensor]) -> Tensor:
    """|v|^2 of a vector of the parameter space, in the accumulation dtype."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in vector:
        if tensor.is_sparse:
            tensor = tensor.coalesce().values()
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return total([torch.ops.rgd_ext.squared_norm(group) for group in groups.values()])


def sum_of_moments(parts: Iterable[Moments]) -> Moments:
    """The moments of gradients whose parts, side by side, have these moments."""
    return Moments(*map(total, zip(*parts, strict=True)))


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of statistics that may come from several devices and accumulation dtypes."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part.to(result.device)
    return result
