"""The contributions of a convolution's weight."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..gradients import Moments
from ..reference import Geometry, accumulate_dtype, block_elements
from .cost import Cost, Rates, of_ghost, of_gradients
from .factors import Blockwise, Dense, Factor, Ghost
from .rates import rates
from .workspace import Empty, fresh


class Convolution(Blockwise):
    """h_i is the weight gradient of sample i's own convolution. In a transposed one E and X change places.

    Args:
        output_grads: E, (B, m, *output).
        inputs: X, (B, n, *space).
        shape: of the weight, (m, n / groups, *kernel).
        geometry: of the convolution.
    """

    def __init__(self, output_grads: Tensor, inputs: Tensor, shape: torch.Size, geometry: Geometry) -> None:
        self.output_grads, self.inputs, self.shape, self.geometry = output_grads, inputs, shape, geometry

    @property
    def why(self) -> str:
        return "a convolution with groups" if self.geometry.groups > 1 else ""

    @property
    def batch_size(self) -> int:
        return self.output_grads.shape[0]

    @property
    def signature(self) -> tuple:
        return self.output_grads.shape, self.inputs.shape

    @property
    def _is_native(self) -> bool:
        """Whether to call the operators on convolutions, whose compiled kernels are for the CPU."""
        return self.output_grads.is_cpu

    @property
    def _places(self) -> int:
        return self.output_grads.shape[2:].numel()

    @property
    def _operations(self) -> int:
        return 2 * self.batch_size * self._places * self.shape.numel()

    def ways(self, needs_gram: bool) -> dict[str, Cost]:
        shape, dtype = torch.Size((self.batch_size, *self.shape)), self.output_grads.dtype
        forming = Cost(convolution=self._operations)
        if self._unfolds:
            forming = _by_unfolding(self._operations, self._copied())
        formed = forming + Cost(stream=shape.numel() * dtype.itemsize, calls=1)
        ways = {"materialise": formed + of_gradients(shape, dtype, needs_gram)}
        if self.geometry.groups > 1:
            return ways
        held = self.plain().held
        combination = self._ordinary() + Cost(stream=2 * self.output_grads.nbytes, calls=2, held=held)
        if self._is_native:
            statistics = Cost(gram=self.batch_size * shape.numel() * needs_gram, calls=3)
        else:
            statistics = self._on_blocks(shape.numel(), needs_gram)
        ghost = of_ghost(self.batch_size, self._places, self.shape[1:].numel(), self.shape[0], dtype.itemsize)
        return ways | {
            "recompute": forming + statistics + combination,
            "ghost": Cost(stream=2 * self._copied(), calls=1) + ghost,
        }

    def plain(self) -> Cost:
        read = self.inputs.nbytes + self.output_grads.nbytes
        return self._ordinary() + Cost(stream=read, calls=1, held=read)

    def _ordinary(self) -> Cost:
        """SGD's weight gradient.

        The measured rate of convolutions is that of per-sample gradients. For the sum over all samples cuDNN has the
        rate of a product.
        """
        return Cost(convolution=self._operations) if self._is_native else Cost(product=self._operations)

    def _copied(self) -> int:
        """The bytes that unfolding the inputs writes."""
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

    def settled(self, way: str, empty: Empty) -> Factor:
        if way == "recompute":
            return self
        if way == "ghost":
            columns = reference.unfolded(self.inputs, self.output_grads.shape[2:], self.geometry)
            return Ghost(columns.mT, self.output_grads.flatten(2).mT, self.shape)
        return Dense(self._formed(empty), is_own=True)

    def _formed(self, empty: Empty) -> Tensor:
        unfolds = self._unfolds
        # Measured: with one output channel per group the native kernel does not fill a vector register.
        is_thin = self.output_grads.shape[1] == self.geometry.groups
        if not unfolds and (is_thin or not self._is_native):
            return reference.conv_weight_grads_as_groups(self.output_grads, self.inputs, self.geometry)
        out = empty((self.batch_size, *self.shape), self.output_grads)
        if unfolds:
            reference.conv_weight_grads_by_unfolding(self.output_grads, self.inputs, self.geometry, out)
        else:
            torch.ops.rgd_ext.conv_weight_grads(self.output_grads, self.inputs, *self.geometry, out)
        return out

    def blocks(self) -> Iterator[Tensor]:
        if not self._unfolds:
            yield from reference.conv_blocks(self.output_grads, self.inputs, self.geometry)
            return
        dtype = accumulate_dtype(self.output_grads.dtype)
        output_grads, inputs = self.output_grads.to(dtype), self.inputs.to(dtype)
        # Each block has some of the input channels, so that every channel is unfolded only once.
        each = self.batch_size * self.shape[0] * self.shape[2:].numel()
        for some in inputs.split(max(1, block_elements(inputs.device) // each), 1):
            out = inputs.new_empty(self.batch_size, self.shape[0], some.shape[1], *self.shape[2:])
            reference.conv_weight_grads_by_unfolding(output_grads, some, self.geometry, out)
            yield out

    def gram(self) -> Tensor:
        if self._is_native:
            return torch.ops.rgd_ext.conv_gram(self.output_grads, self.inputs, *self.geometry[:-1])
        return super().gram()

    def moments(self) -> Moments:
        if self._is_native:
            return torch.ops.rgd_ext.conv_scalar_moments(self.output_grads, self.inputs, *self.geometry[:-1])
        return super().moments()

    def align(self, vector: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.geometry.kernel) - 1]
        dtype = accumulate_dtype(self.output_grads.dtype)
        output = convolve(self.inputs.to(dtype), vector.to(dtype), None, *self.geometry[1:])
        used = tuple(slice(places) for places in self.output_grads.shape[2:])
        return (output[(..., *used)] * self.output_grads).flatten(1).sum(1)

    def combine(self, weights: Tensor) -> Tensor:
        # Of 16 bits in float32: a weight is 1 and a small correction, which they would lose.
        weighted = self.output_grads * weights.view(-1, *[1] * (self.output_grads.ndim - 1))
        gradient = reference.conv_weight_grad(weighted, self.inputs.to(weighted.dtype), self.geometry)
        return gradient.to(self.output_grads.dtype)

    def dense(self) -> Tensor:
        return self._formed(fresh)


def _by_unfolding(operations: int, copied: int) -> Cost:
    return Cost(product=operations, stream=2 * copied, calls=4 * (1 + copied // reference.UNFOLDED_BYTES))


@lru_cache
def _unfolding_is_faster(operations: int, copied: int, measured: Rates) -> bool:
    return _by_unfolding(operations, copied).seconds(measured) < Cost(convolution=operations).seconds(measured)
