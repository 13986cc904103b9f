"""The memory of the gradients that a backward forms."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

# (shape, like) -> a tensor of that shape, with the dtype and the device of `like` and undefined values.
Empty = Callable[[Sequence[int], Tensor], Tensor]


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor with memory of its own, for gradients that outlive the backward."""
    return like.new_empty(shape)


_IN_USE = (
    "a backward of the captured model began while a policy or a rule was choosing for another one, whose gradients it"
    " would overwrite: run it before the other one, or forward and backward under"
    " `with handle.paused(), torch.enable_grad():`"
)
# How many bytes may stay allocated between backwards. To allocate them again takes small models a noticeable time.
KEPT_BYTES = 16 << 20
# The least number of bytes of a block that is put in huge pages.
_HUGE_PAGE_BYTES = 2 << 20


@cache
def _madvise() -> Callable | None:
    """The C library's function `madvise`, or None where huge pages cannot be asked for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def _allocated(size: int) -> Tensor:
    """A tensor of `size` undefined bytes.

    Large ones are in huge pages, where the system has them: it fills every page with zeros on first use, which with
    pages of 4 KB takes longer than to write gradients, as measurements show.
    """
    block = torch.empty(size, dtype=torch.uint8)
    madvise = _madvise() if size >= _HUGE_PAGE_BYTES else None
    if madvise is not None:
        start = block.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, block.data_ptr() + size - start, mmap.MADV_HUGEPAGE)  # may fail, since it is only advice
    return block


class Workspace:
    """Memory on the CPU that is used again by the next backward, or by the next block of gradients.

    On CUDA, where torch keeps memory by itself, every tensor is a new one.

    Args:
        kept: how many bytes `release` leaves allocated.
    """

    def __init__(self, kept: int = KEPT_BYTES) -> None:
        self.kept = kept
        # The blocks of memory, and the tensor that was last made of each.
        self._blocks: list[Tensor] = []
        self._tensors: list[Tensor] = []
        self._used = 0
        self._is_read = False

    def restart(self) -> None:
        """Let the memory of all tensors that were returned so far be used again.

        Raises:
            RuntimeError: while they are read.
        """
        if self._is_read:
            raise RuntimeError(_IN_USE)
        self._used = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, what is in the memory is read, and may not be overwritten."""
        self._is_read = True
        try:
            yield
        finally:
            self._is_read = False

    def release(self) -> None:
        """Free the memory, if it is more than may stay allocated."""
        if sum(block.numel() for block in self._blocks) > self.kept:
            self.clear()

    def clear(self) -> None:
        """Free the memory."""
        self._blocks, self._tensors, self._used = [], [], 0

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of that shape with undefined values, valid until the next `restart`.

        Args:
            shape: the shape.
            like: a tensor with the dtype and the device.
        """
        if not like.is_cpu:
            return like.new_empty(shape)
        index = self._used
        self._used += 1
        if index == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
            self._tensors.append(self._blocks[index])
        last = self._tensors[index]
        if last.shape == shape and last.dtype == like.dtype:
            return last  # usually the shapes are the same in every step
        size = torch.Size(shape).numel() * like.dtype.itemsize
        if self._blocks[index].numel() < size:
            self._blocks[index] = _allocated(size)
        self._tensors[index] = self._blocks[index][:size].view(like.dtype).view(shape)
        return self._tensors[index]
