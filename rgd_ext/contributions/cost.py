"""The cost of computations, in operations and bytes, which the rates of a device turn into seconds."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

# Without a budget the gradients of a layer may take this many times the memory of its inputs and output gradients.
SHARE = 3


@dataclass(frozen=True)
class Rates:
    """How much a device does per second.

    Attributes:
        product: floating-point operations of products of matrices.
        convolution: floating-point operations of per-sample gradients of convolutions.
        gram: multiply-adds of Gramians.
        stream: bytes to and from memory.
        calls: calls of operators.
    """

    product: float
    convolution: float
    gram: float
    stream: float
    calls: float


@dataclass(frozen=True)
class Cost:
    """The cost of a computation.

    Attributes:
        product, convolution, gram, stream, calls: how much it does of what `Rates` counts per second.
        held: the bytes that it holds until the backward ends.
    """

    product: float = 0
    convolution: float = 0
    gram: float = 0
    stream: float = 0
    calls: float = 0
    held: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def seconds(self, rates: Rates) -> float:
        """The estimated time on a device with these rates."""
        operations = self.product / rates.product + self.convolution / rates.convolution + self.gram / rates.gram
        return operations + self.stream / rates.stream + self.calls / rates.calls


def dense_cost(shape: torch.Size, dtype: torch.dtype, needs_gram: bool) -> Cost:
    """The cost of the statistics and the combination of (B, *) gradients in memory, which each read them once."""
    nbytes = shape.numel() * dtype.itemsize
    return Cost(gram=shape[0] * shape.numel() * needs_gram, stream=2 * nbytes, calls=2, held=nbytes)


def ghost_cost(batch_size: int, length: int, n: int, m: int, size: int) -> Cost:
    """The cost of the Gramian and the combination from inputs (B, T, n) and output gradients (B, T, m).

    A number takes `size` bytes.
    """
    places = batch_size * length
    # The products between all pairs of places are formed, multiplied and summed.
    grads, pairs = size * places * m, places**2
    operations = 2 * places * n * m + 2 * pairs * (n + m)
    return Cost(product=operations, stream=2 * grads + 2 * pairs * size, calls=6, held=grads + size * places * n)
