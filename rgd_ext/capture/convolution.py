"""The contributions of a convolution's weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..gradients import Moments
from ..reference import Geometry, accumulate_dtype
from .cost import Cost, of_ghost, of_gradients
from .factors import Dense, Factor, Ghost
from .workspace import Empty, fresh


class Convolution:
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
    def example(self) -> Tensor:
        return self.output_grads

    @property
    def signature(self) -> tuple:
        return self.output_grads.shape, self.inputs.shape

    @property
    def _places(self) -> int:
        return self.output_grads.shape[2:].numel()

    def ways(self, needs_gram: bool) -> dict[str, Cost]:
        shape, dtype = torch.Size((self.batch_size, *self.shape)), self.output_grads.dtype
        product = self.plain().convolution
        formed = Cost(convolution=product, stream=shape.numel() * dtype.itemsize, calls=1)
        ways = {"materialise": formed + of_gradients(shape, dtype, needs_gram)}
        if self.geometry.groups > 1:
            return ways
        held = self.plain().held
        combination = Cost(convolution=product, stream=2 * self.output_grads.nbytes, calls=2, held=held)
        blocks = 1 if self.output_grads.is_cpu else 1 + shape.numel() // reference.BLOCK
        statistics = Cost(convolution=product, gram=shape.numel() * self.batch_size * needs_gram, calls=3 * blocks)
        ways["recompute"] = statistics + combination
        if self._unfolds():
            n, size = self.shape[1:].numel(), dtype.itemsize
            unfolding = Cost(stream=2 * size * self.batch_size * self._places * n, calls=1)
            ways["ghost"] = unfolding + of_ghost(self.batch_size, self._places, n, self.shape[0], size)
        return ways

    def _unfolds(self) -> bool:
        """Whether `F.unfold` has a column for every place of E, and no more."""
        return len(self.geometry.kernel) == 2 and not any(self.geometry.unused(self.output_grads, self.inputs))

    def plain(self) -> Cost:
        operations = 2 * self.batch_size * self._places * self.shape.numel()
        read = self.inputs.nbytes + self.output_grads.nbytes
        return Cost(convolution=operations, stream=read, calls=1, held=read)

    def settled(self, way: str, empty: Empty) -> Factor:
        if way == "recompute":
            return self
        if way == "ghost":
            kernel, stride, padding, dilation, _ = self.geometry
            columns = F.unfold(self.inputs, kernel, dilation, padding, stride)
            return Ghost(columns.mT, self.output_grads.flatten(2).mT, self.shape)
        return Dense(self._formed(self.output_grads, self.inputs, empty), is_own=True)

    def _formed(self, output_grads: Tensor, inputs: Tensor, empty: Empty) -> Tensor:
        channels = output_grads.shape[1]
        # The native kernel is for the CPU. Measured: with one output channel per group it fills no vector.
        if not output_grads.is_cpu or channels == self.geometry.groups:
            return reference.conv_weight_grads_as_groups(output_grads, inputs, self.geometry)
        out = empty((self.batch_size, channels, *self.shape[1:]), output_grads)
        torch.ops.rgd_ext.conv_weight_grads(output_grads, inputs, *self.geometry, out)
        return out

    def gram(self) -> Tensor:
        return torch.ops.rgd_ext.conv_gram(self.output_grads, self.inputs, *self.geometry[:-1])

    def moments(self) -> Moments:
        return torch.ops.rgd_ext.conv_scalar_moments(self.output_grads, self.inputs, *self.geometry[:-1])

    def align(self, vector: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.geometry.kernel) - 1]
        dtype = accumulate_dtype(self.output_grads.dtype)
        output = convolve(self.inputs.to(dtype), vector.to(dtype), None, *self.geometry[1:])
        used = tuple(slice(places) for places in self.output_grads.shape[2:])
        return (output[(..., *used)] * self.output_grads).flatten(1).sum(1)

    def combine(self, weights: Tensor) -> Tensor:
        weighted = self.output_grads * weights.view(-1, *[1] * (self.output_grads.ndim - 1))
        return reference.conv_weight_grad(weighted, self.inputs, self.geometry)

    def dense(self) -> Tensor:
        return self._formed(self.output_grads, self.inputs, fresh)
