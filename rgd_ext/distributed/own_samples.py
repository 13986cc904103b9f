"""The per-sample gradients of one process, whose direction is averaged with those of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..gradients import Moments, PerSampleGradients, squared_norm, sum_of_moments, total
from ..linalg import accumulate_dtype
from ..metric.stats import statistics
from .blocks import Block, UsedParameters, aligned_parts
from .group import Group


class OwnSamples(PerSampleGradients):
    """The gradients of this process's samples; combinations are the mean of those of all R processes.

    All processes have to form the same number of combinations: each is an exchange, block by block.

    Args:
        blocks: the blocks, with the contributions of this process.
        used: which parameters the processes use.
        group: the processes.
    """

    def __init__(self, blocks: Sequence[Block], used: UsedParameters, group: Group) -> None:
        self._blocks, self._parameters, self._group = blocks, used.anywhere(), group

    @property
    def batch_size(self) -> int:
        """B_r, the number of samples in this process; 0 without contributions."""
        return next((block.local.batch_size for block in self._blocks if block.local), 0)

    def parameters(self) -> list[nn.Parameter]:
        """Those that any process uses, in the order of vectors of the parameter space."""
        return self._parameters

    def gram(self) -> Tensor:
        """K = G G^T, shape (B_r, B_r), not centred."""
        return total([block.local.gram() for block in self._blocks if block.local])

    def moments(self) -> Moments | None:
        """The statistics that need no Gramian; None where the Gramian costs no more."""
        found = [(block.local, block.local.moments()) for block in self._blocks if block.local]
        if all(moments is None for _, moments in found):
            return None
        return sum_of_moments([moments or statistics(local, with_gram=True).moments for local, moments in found])

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B_r,), not centred."""
        return self.align_by_parameter(dict(zip(self._parameters, vector, strict=True)))

    def align_by_parameter(self, vectors: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """`align` with a vector whose parts are given by parameter; those of other parameters are zero."""
        return total(aligned_parts(self._blocks, vectors))

    def release(self) -> OwnSamples:
        """From now on the next `combine` or `combine_with_norm` uses the contributions of this process up."""
        return self

    def mean(self) -> list[Tensor]:
        """The mean over the processes of g = mean_i g_i."""
        like = self._blocks[0].layout.parameters[0]
        dtype = accumulate_dtype(like.dtype)
        return self.combine(torch.full((self.batch_size,), 1 / self.batch_size, dtype=dtype, device=like.device))

    def combine(self, weights: Tensor) -> list[Tensor]:
        """The mean over the processes of w^T G = sum_i w_i g_i; uses the contributions up."""
        return self._combination(weights, [])

    def combine_with_norm(self, weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """`combine`, and |p|^2 for the p = w^T G of this process."""
        parts: list[Tensor] = []
        found = self._combination(weights, parts)
        return found, self._group.size**2 * total(parts)

    def combine_nothing(self) -> list[Tensor]:
        """`combine` of a process without samples."""
        return self._combination(None, [])

    def _combination(self, weights: Tensor | None, squares: list[Tensor]) -> list[Tensor]:
        """The combination; adds the squared norms of what this process sends to `squares`."""
        found: dict[nn.Parameter, Tensor] = {}
        for block in self._blocks:
            parts = () if weights is None or not block.local else self._averaged(block, weights, squares)
            found |= block.layout.summed(self._group, "the directions", parts).parts
        return [found[parameter] for parameter in self._parameters]

    def _averaged(self, block: Block, weights: Tensor, squares: list[Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter, part in block.local.release().combine_by_parameter(weights / self._group.size):
            squares.append(squared_norm([part]))
            yield parameter, part
