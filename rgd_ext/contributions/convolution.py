"""The contributions to the weight of a convolution."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import convolutions
from ..convolutions import Geometry
from ..gradients import Moments
from ..linalg import accumulate_dtype, block_elements
from .blockwise import Blockwise
from .buffers import Empty, fresh
from .cost import Cost, Rates, dense_cost, ghost_cost
from .factor import Dense, Factor
from .outer import Ghost
from .rates import rates


class Convolution(Blockwise):
    """h_i is the weight gradient of the convolution of sample i. In a transposed one E and X change places.

    Args:
        output_grads: E, (B, m, *output).
        inputs: X, (B, n, *space).
        shape: the shape of the weight, (m, n / groups, *kernel).
        geometry: the convolution's numbers besides the channels.
    """

    def __init__(self, output_grads: Tensor, inputs: Tensor, shape: torch.Size, geometry: Geometry) -> None:
        self.output_grads, self.inputs, self.shape, self.geometry = output_grads, inputs, shape, geometry
        self.why = "a convolution with groups" if geometry.groups > 1 else ""

    @property
    def batch_size(self) -> int:
        return self.output_grads.shape[0]

    @property
    def example(self) -> Tensor:
        return self.output_grads

    @property
    def signature(self) -> tuple:
        return self.output_grads.shape, self.inputs.shape

    @property
    def _is_native(self) -> bool:
        """Whether to call the operators on convolutions, which have compiled kernels for the CPU only."""
        return self.output_grads.is_cpu

    @property
    def _places(self) -> int:
        return self.output_grads.shape[2:].numel()

    @property
    def _operations(self) -> int:
        return 2 * self.batch_size * self._places * self.shape.numel()

    def strategies(self, needs_gram: bool) -> dict[str, Cost]:
        shape, dtype = torch.Size((self.batch_size, *self.shape)), self.output_grads.dtype
        forming = Cost(convolution=self._operations)
        if self._unfolds:
            forming = _by_unfolding(self._operations, self._copied())
        formed = forming + Cost(stream=shape.numel() * dtype.itemsize, calls=1)
        strategies = {"materialise": formed + dense_cost(shape, dtype, needs_gram)}
        if self.geometry.groups > 1:
            return strategies
        held = self.plain().held
        combination = self._ordinary() + Cost(stream=2 * self.output_grads.nbytes, calls=2, held=held)
        if self._is_native:
            statistics = Cost(gram=self.batch_size * shape.numel() * needs_gram, calls=3)
        else:
            statistics = self._on_blocks(shape.numel(), needs_gram)
        ghost = ghost_cost(self.batch_size, self._places, self.shape[1:].numel(), self.shape[0], dtype.itemsize)
        return strategies | {
            "recompute": forming + statistics + combination,
            "ghost": Cost(stream=2 * self._copied(), calls=1) + ghost,
        }

    def plain(self) -> Cost:
        read = self.inputs.nbytes + self.output_grads.nbytes
        return self._ordinary() + Cost(stream=read, calls=1, held=read)

    def _ordinary(self) -> Cost:
        """The operations of the ordinary weight gradient.

        The measured rate of convolutions is that of per-sample gradients. For the sum over all samples cuDNN has the
        rate of a product.
        """
        return Cost(convolution=self._operations) if self._is_native else Cost(product=self._operations)

    def _copied(self) -> int:
        """The bytes that are written when the inputs are unfolded."""
        columns = self.batch_size * self._places * self.shape[1:].numel() * self.geometry.groups
        return 0 if self.geometry.is_pointwise else columns * self.inputs.itemsize

    @property
    def _unfolds(self) -> bool:
        """Whether products with unfolded inputs are faster than a cuDNN convolution with every sample a group."""
        if self._is_native:
            return False
        return _unfolding_is_faster(
            self._operations, self._copied(), rates(self.output_grads.device, self.output_grads.dtype)
        )

    def apply(self, strategy: str, empty: Empty) -> Factor:
        if strategy == "recompute":
            return self
        if strategy == "ghost":
            columns = convolutions.unfolded(self.inputs, self.output_grads.shape[2:], self.geometry)
            return Ghost(columns.mT, self.output_grads.flatten(2).mT, self.shape)
        return Dense(self._formed(empty), is_own=True)

    def _formed(self, empty: Empty) -> Tensor:
        unfolds = self._unfolds
        # With one output channel per group the native kernel does not fill a vector register, as measurements show.
        is_thin = self.output_grads.shape[1] == self.geometry.groups
        if not unfolds and (is_thin or not self._is_native):
            return convolutions.conv_weight_grads_as_groups(self.output_grads, self.inputs, self.geometry)
        out = empty((self.batch_size, *self.shape), self.output_grads)
        if unfolds:
            convolutions.conv_weight_grads_by_unfolding(self.output_grads, self.inputs, self.geometry, out)
        else:
            torch.ops.rgd_ext.conv_weight_grads(self.output_grads, self.inputs, *self.geometry, out)
        return out

    def blocks(self) -> Iterator[Tensor]:
        if not self._unfolds:
            yield from convolutions.conv_blocks(self.output_grads, self.inputs, self.geometry)
            return
        dtype = accumulate_dtype(self.output_grads.dtype)
        output_grads, inputs = self.output_grads.to(dtype), self.inputs.to(dtype)
        # Each block has some of the input channels, so that every channel is unfolded only once.
        each = self.batch_size * self.shape[0] * self.shape[2:].numel()
        for some in inputs.split(max(1, block_elements(inputs.device) // each), 1):
            out = inputs.new_empty(self.batch_size, self.shape[0], some.shape[1], *self.shape[2:])
            convolutions.conv_weight_grads_by_unfolding(output_grads, some, self.geometry, out)
            yield out

    def gram(self) -> Tensor:
        if self._is_native:
            return torch.ops.rgd_ext.conv_gram(self.output_grads, self.inputs, *self.geometry[:-1])
        return super().gram()

    def moments(self) -> Moments:
        if self._is_native:
            found = torch.ops.rgd_ext.conv_scalar_moments(self.output_grads, self.inputs, *self.geometry[:-1])
            return Moments(*found)
        return super().moments()

    def align(self, vector: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.geometry.kernel) - 1]
        dtype = accumulate_dtype(self.output_grads.dtype)
        output = convolve(self.inputs.to(dtype), vector.to(dtype), None, *self.geometry[1:])
        used: tuple[Any, ...] = (..., *map(slice, self.output_grads.shape[2:]))
        return (output[used] * self.output_grads).flatten(1).sum(1)

    def combine(self, weights: Tensor) -> Tensor:
        # Weighted gradients of 16 bits are in float32: a weight is 1 and a small correction, which they would lose.
        weighted = self.output_grads * weights.view(-1, *[1] * (self.output_grads.ndim - 1))
        gradient = convolutions.conv_weight_grad(weighted, self.inputs.to(weighted.dtype), self.geometry)
        return gradient.to(self.output_grads.dtype)

    def dense(self) -> Tensor:
        return self._formed(fresh)


def _by_unfolding(operations: int, copied: int) -> Cost:
    return Cost(product=operations, stream=2 * copied, calls=4 * (1 + copied // convolutions.UNFOLDED_BYTES))


@lru_cache
def _unfolding_is_faster(operations: int, copied: int, measured: Rates) -> bool:
    return _by_unfolding(operations, copied).seconds(measured) < Cost(convolution=operations).seconds(measured)
