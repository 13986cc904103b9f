"""What computations cost: operations and bytes, which the rates of a device turn into seconds."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

# Without a budget gradients may take so many times what their layer's inputs and output gradients take.
SHARE = 3


@dataclass(frozen=True)
class Rates:
    """Per second: floating-point operations of each kind, bytes to and from memory, and calls of operators."""

    product: float
    convolution: float
    gram: float
    stream: float
    calls: float


@dataclass(frozen=True)
class Cost:
    """Floating-point operations by kind, bytes moved, calls of operators; and bytes held until a backward ends."""

    product: float = 0
    convolution: float = 0
    gram: float = 0
    stream: float = 0
    calls: float = 0
    held: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def seconds(self, rates: Rates) -> float:
        """Estimated time."""
        operations = self.product / rates.product + self.convolution / rates.convolution + self.gram / rates.gram
        return operations + self.stream / rates.stream + self.calls / rates.calls


def of_gradients(shape: torch.Size, dtype: torch.dtype, needs_gram: bool) -> Cost:
    """Statistics and combination of (B, *) gradients in memory: a read each."""
    nbytes = shape.numel() * dtype.itemsize
    return Cost(gram=shape[0] * shape.numel() * needs_gram, stream=2 * nbytes, calls=2, held=nbytes)


def of_ghost(batch_size: int, length: int, n: int, m: int, size: int) -> Cost:
    """Gramian and combination from inputs (B, T, n) and output gradients (B, T, m), of `size` bytes a number."""
    places = batch_size * length
    grads, pairs = size * places * m, places**2  # products between all places, which are then multiplied and summed
    operations = 2 * places * n * m + 2 * pairs * (n + m)
    return Cost(product=operations, stream=2 * grads + 2 * pairs * size, calls=6, held=grads + size * places * n)
