"""The contributions of the samples to one parameter, in the form in which its layer gives them.

A backward of a loss L gives contributions h_i with sum_i h_i = grad L. The per-sample gradients are g_i = B h_i, so
that their mean is grad L whatever the reduction of the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..gradients import Moments, aligned, moments_of
from .buffers import Empty
from .cost import Cost, dense_cost
from .vectors import VectorLayers


class Factor(ABC):
    """Contributions h_i to one parameter, which stand for a tensor (B, *shape).

    The planner asks for `strategies` and applies one of them. The statistics and the combination are asked of what
    `apply` returns; by default they are computed from the tensor that `dense` returns.

    Attributes:
        why: the reason why there is only one strategy, for the user; empty where there are several.
        is_sparse: whether the parameter's ordinary gradient is a sparse tensor.
        gram_is_free: whether the Gramian costs no more than the moments, and is given wherever the moments are.
    """

    why: str = ""
    is_sparse: bool = False
    gram_is_free: bool = False

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """B, the number of samples."""

    @property
    @abstractmethod
    def example(self) -> Tensor:
        """A tensor with the dtype and the device of the contributions."""

    @property
    @abstractmethod
    def signature(self) -> tuple:
        """All that the costs depend on, besides the dtype and the device of `example`."""

    @abstractmethod
    def strategies(self, needs_gram: bool) -> dict[str, Cost]:
        """The strategies to compute the statistics and the combination, by name, and the cost of each.

        Args:
            needs_gram: whether the statistics include the Gramian.
        """

    @abstractmethod
    def plain(self) -> Cost:
        """The cost of the parameter's ordinary gradient, which holds the inputs and the output gradients."""

    def apply(self, strategy: str, empty: Empty) -> Factor:
        """The contributions in the form that `strategy` works on.

        Args:
            strategy: one of `strategies`.
            empty: allocates the memory of gradients that are formed.
        """
        return self

    def as_tensor(self) -> Tensor | None:
        """The h_i as one tensor (B, *shape), if that is the form that they have."""
        return None

    def as_vectors(self) -> VectorLayers | None:
        """The layer that gives the h_i, if it is a linear one that met one vector per sample."""
        return None

    @abstractmethod
    def align(self, vector: Tensor) -> Tensor:
        """<h_i, v>, shape (B,), in the accumulation dtype."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The h_i as one tensor (B, *shape)."""

    def gram(self) -> Tensor:
        """<h_i, h_j>, shape (B, B), in the accumulation dtype."""
        return torch.ops.rgd_ext.gram([self.dense()])

    def moments(self) -> Moments:
        """The moments of the h_i."""
        return moments_of([self.dense()])

    def combine(self, weights: Tensor) -> Tensor:
        """sum_i w_i h_i, shape (*shape), for weights in the accumulation dtype on the device of the contributions."""
        return torch.ops.rgd_ext.combine([self.dense()], weights)[0]

    def combine_sparse(self, weights: Tensor) -> Tensor:
        """`combine` as a sparse tensor where `is_sparse`."""
        return self.combine(weights)


def moments_from_gram(gram: Tensor) -> Moments:
    """The moments of contributions with the Gramian `gram`, in its dtype."""
    return Moments(*(moment.to(gram.dtype) for moment in torch.ops.rgd_ext.gram_moments(gram)[:3]))


def blank(example: Tensor, *shape: int) -> Tensor:
    """Zeros of the dtype and on the device of `example`, without memory for each of them."""
    return example.new_zeros(()).expand(shape)


class Dense(Factor):
    """Contributions that are a tensor (B, *shape).

    Args:
        contributions: the tensor.
        is_own: whether it may be overwritten.
        why: the reason why there is only this strategy, for the user.
    """

    def __init__(self, contributions: Tensor, is_own: bool = False, why: str = "formed by the layer's rule") -> None:
        self.contributions, self.is_own, self.why = contributions, is_own, why

    @property
    def batch_size(self) -> int:
        return self.contributions.shape[0]

    @property
    def example(self) -> Tensor:
        return self.contributions

    @property
    def signature(self) -> tuple:
        return self.contributions.shape, self.why

    def strategies(self, needs_gram: bool) -> dict[str, Cost]:
        return {"materialise": dense_cost(self.contributions.shape, self.contributions.dtype, needs_gram)}

    def plain(self) -> Cost:
        return Cost(stream=self.contributions.nbytes, calls=1)

    def as_tensor(self) -> Tensor:
        return self.contributions

    def align(self, vector: Tensor) -> Tensor:
        return aligned(self.contributions, vector)

    def dense(self) -> Tensor:
        return self.contributions
