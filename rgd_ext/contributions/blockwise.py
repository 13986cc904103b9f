"""Statistics from gradients that are formed one block after another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from .. import ops
from ..gradients import Moments, moments_of
from ..linalg import accumulate_dtype, block_elements
from .cost import Cost
from .factor import Factor


class Blockwise(Factor):
    """Contributions whose gradients are formed a block at a time for the statistics, and not kept."""

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """The columns of the (B, d) matrix of the h_i as (B, ...) tensors, in the accumulation dtype.

        Columns without a block are zero. A block is valid until the next one is asked for.
        """

    def gram(self) -> Tensor:
        return reduce(Tensor.add_, map(ops.gram, self.blocks()))

    def moments(self) -> Moments:
        parts = (moments_of([block]) for block in self.blocks())
        return reduce(lambda one, other: Moments(*map(torch.add, one, other)), parts)

    def _on_blocks(self, number: int, needs_gram: bool) -> Cost:
        """The cost of the statistics of gradients with `number` elements, a block at a time."""
        device, dtype = self.example.device, accumulate_dtype(self.example.dtype)
        # On a GPU a block does not fit in the caches: it is written to memory and read again.
        stream = 0 if device.type == "cpu" else 2 * number * dtype.itemsize
        blocks = 1 + number // block_elements(device)
        return Cost(gram=self.batch_size * number * needs_gram, stream=stream, calls=3 * blocks)
