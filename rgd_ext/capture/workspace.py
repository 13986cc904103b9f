"""Where a backward puts the gradients it forms."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

# (shape, like) -> a tensor of that shape with the dtype and device of `like`, its values undefined.
Empty = Callable[[Sequence[int], Tensor], Tensor]


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory of its own, for gradients that outlive the backward."""
    return like.new_empty(shape)


# Bytes that stay between backwards: small models would feel asking for them again.
LITTLE = 16 << 20
# Bytes from which on a block is worth pages of its own.
_LARGE = 2 << 20


@cache
def _madvise() -> Callable | None:
    """The C library's function, where there is one."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def _memory(size: int) -> Tensor:
    """So many bytes, undefined. Large blocks are in huge pages, where the system has them.

    It fills every page with zeros on first use. Measured: with pages of 4 KB that takes longer than writing gradients.
    """
    block = torch.empty(size, dtype=torch.uint8)
    madvise = _madvise() if size >= _LARGE else None
    if madvise is not None:
        start = block.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, block.data_ptr() + size - start, mmap.MADV_HUGEPAGE)  # advice: it may fail
    return block


class Workspace:
    """Memory on the CPU that one backward, or one block of gradients, after the other uses. CUDA keeps its own.

    Args:
        kept: bytes that may stay between backwards.
    """

    def __init__(self, kept: int = LITTLE) -> None:
        self.kept = kept
        # Memory, and what was handed out of it last.
        self._blocks: list[Tensor] = []
        self._tensors: list[Tensor] = []
        self._used = 0

    def restart(self) -> None:
        """What was handed out so far is free again."""
        self._used = 0

    def release(self) -> None:
        """Give the memory back, if it is more than may stay."""
        if sum(block.numel() for block in self._blocks) > self.kept:
            self._blocks, self._tensors, self._used = [], [], 0

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
            self._blocks[index] = _memory(size)
        self._tensors[index] = self._blocks[index][:size].view(like.dtype).view(shape)
        return self._tensors[index]
