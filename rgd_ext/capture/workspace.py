"""Where a backward puts the gradients it forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (shape, like) -> a tensor of that shape with the dtype and device of `like`, its values undefined.
Empty = Callable[[Sequence[int], Tensor], Tensor]


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory of its own, for gradients that outlive the backward."""
    return like.new_empty(shape)


# Bytes of all blocks together up to which they stay where any are to: small models would feel asking for them again.
_SMALL = 16 << 20


class Workspace:
    """Memory on the CPU that one backward, or one block of gradients, after the other uses, all or some of it.

    The allocator gives large blocks back to the system, and has every page of new ones filled with zeros on first use;
    measured, that takes longer than writing the gradients. On CUDA PyTorch keeps its blocks itself.
    """

    def __init__(self) -> None:
        # Memory, and what was handed out of it last.
        self._blocks: list[Tensor] = []
        self._tensors: list[Tensor] = []
        self._used = 0

    def restart(self) -> None:
        """What was handed out so far is free again."""
        self._used = 0

    def release(self, share: float) -> None:
        """Give back what was handed out, but for the first of it that take up to `share` of its memory.

        Little memory stays, unless `share` is 0.
        """
        used = self._blocks[: self._used]
        total = sum(block.numel() for block in used)
        if share and total <= _SMALL:
            return
        left = share * total
        for index, block in enumerate(used):
            left -= block.numel()
            if left < 0:
                self._blocks[index] = self._tensors[index] = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """As `torch.empty(shape)`, valid until the next `restart`."""
        if not like.is_cpu:
            return like.new_empty(shape)
        index = self._used
        self._used += 1
        if index == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
            self._tensors.append(self._blocks[index])
        last = self._tensors[index]
        if last.shape == shape and last.dtype == like.dtype:
            return last  # the same in every step, as a rule
        size = torch.Size(shape).numel() * like.dtype.itemsize
        if self._blocks[index].numel() < size:
            self._blocks[index] = torch.empty(size, dtype=torch.uint8)
        self._tensors[index] = self._blocks[index][:size].view(like.dtype).view(shape)
        return self._tensors[index]
