"""A ledger that tells the parameters apart in its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..gradients import Moments, moments_of, sum_of_moments
from ..linalg import accumulate_dtype
from .bucket import Bucket, moments_and_sums, split_by_owner
from .factor import moments_from_gram
from .ledger import Contributions


class Item(NamedTuple):
    """The statistics of one parameter.

    Attributes:
        squared_grad_norm: |g|^2, a scalar, for its part g of the mean gradient.
        trace: tr D, a scalar, for the covariance D of its part of the g_i.
    """

    squared_grad_norm: Tensor
    trace: Tensor


class ItemisedContributions(Contributions):
    """Contributions that note the statistics of each parameter while those of all are computed, in the same reads.

    Args:
        contributions: a closed ledger, whose contents this one shares from now on.
    """

    def __init__(self, contributions: Contributions) -> None:
        super().__init__(contributions.batch_size)
        self._buckets, self._factors = contributions._buckets, contributions._factors
        self._items: dict[nn.Parameter, Item] = {}
        # sum_i |h_i|^2 of vectors, whose gradients are not formed: moments would take a Gramian for each of them.
        self._squares: dict[nn.Parameter, Tensor] = {}
        for (dtype, _), bucket in self._buckets.items():
            if dtype == accumulate_dtype(dtype):
                self._squares.update(_squares(bucket))
            else:  # 16 bits of the mean would not tell its norm from that of the gradients
                for parameter, factor in bucket.vector_factors():
                    self._note(parameter, factor.moments())

    def split(self, blocks: Iterable[Sequence[nn.Parameter]]) -> list[Contributions]:
        return [ItemisedContributions(part) for part in super().split(blocks)]

    def items(self, squared_norm_of: Callable[[nn.Parameter], Tensor]) -> dict[nn.Parameter, Item]:
        """The statistics of each parameter, after those of all.

        Args:
            squared_norm_of: gives |g|^2 for the part of a parameter in the mean gradient.
        """
        found = dict(self._items)
        for parameter, square in self._squares.items():
            squared_grad_norm = squared_norm_of(parameter)
            # mean_i |g_i|^2 - |g|^2, without the rounding errors where it is zero.
            trace = (self._batch_size * square - squared_grad_norm).clamp(min=0) * (self._batch_size > 1)
            found[parameter] = Item(squared_grad_norm, trace)
        return found

    def _note(self, parameter: nn.Parameter, moments: Moments) -> Moments:
        scale = float(self._batch_size**2)  # from the h_i to the g_i
        self._items[parameter] = Item(scale * moments.squared_grad_norm, scale * moments.squared_norms.mean())
        return moments

    def gram(self) -> Tensor:
        for bucket in self._buckets.values():
            for parameter, factor in bucket.tensor_factors():
                self._note(parameter, factor.moments())
        return super().gram()

    def _factor_grams(self) -> list[Tensor]:
        grams = super()._factor_grams()
        for parameter, gram in zip(self._factors, grams, strict=True):
            self._note(parameter, moments_from_gram(gram))
        return grams

    def _factor_moments(self) -> list[Moments]:
        return [self._note(parameter, factor.moments()) for parameter, factor in self._factors.items()]

    def _tensor_moments(self, bucket: Bucket) -> Moments:
        return sum_of_moments(
            [self._note(parameter, factor.moments()) for parameter, factor in bucket.tensor_factors()]
        )

    def _tensor_moments_and_sums(self, bucket: Bucket) -> tuple[Moments, list[Tensor]]:
        parts: list[Moments] = []
        sums: list[Tensor] = []
        for owners, tensor in zip(bucket.owners, bucket.tensors, strict=True):
            moments, own = moments_and_sums([tensor])
            parts.append(moments)
            sums += own
            if len(owners) == 1:
                self._note(owners[0], moments)
                continue
            for parameter, part in split_by_owner(owners, tensor):
                self._note(parameter, moments_of([part]))
        return sum_of_moments(parts), sums


def _squares(bucket: Bucket) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter of the linear layers, and sum_i |h_i|^2 for its contributions, in float64."""
    for weight, bias, x, e in bucket.layers():
        of_grads = _norms(e).square()
        if bias is not None:
            yield bias, of_grads.sum()
        if weight is not None:
            yield weight, _norms(x).square() @ of_grads


def _norms(rows: Tensor) -> Tensor:
    """The norms of the rows of a matrix. Their rounding errors, of some ulps each, are independent."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=accumulate_dtype(rows.dtype)).double()
