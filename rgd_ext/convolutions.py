"""Per-sample weight gradients of convolutions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linalg import accumulate_dtype, block_elements


class Geometry(NamedTuple):
    """The geometry of a convolution with zero padding: a number per dimension of space, and the number of groups."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @property
    def is_pointwise(self) -> bool:
        """Whether each place of the output depends only on the same place of the input."""
        return all(numbers == (1, 1, 0) for numbers in zip(self.kernel, self.stride, self.padding, strict=True))

    def places(self, space: Sequence[int]) -> list[int]:
        """The number of places per dimension in the output, for an input of size `space`."""
        sizes = zip(space, *self[:4], strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]

    def unused(self, places: Sequence[int], space: Sequence[int]) -> list[int]:
        """The number of places per dimension that an output of size `places` lacks, for an input of size `space`.

        Some are missing only for a transposed convolution, whose output is the input here.

        Raises:
            ValueError: if `places` is too large for the input.
        """
        unused = [most - number for most, number in zip(self.places(space), places, strict=True)]
        if min(unused) < 0:
            raise ValueError(
                f"output_grad has {tuple(places)} places: those are more places than a convolution of {tuple(space)}"
                f" with {self} gives"
            )
        return unused


def conv_weight_grads_as_groups(output_grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Per-sample weight gradients, (B, m, n / groups, *kernel), from one convolution whose groups are the samples."""
    grads, images = (y.reshape(1, -1, *y.shape[2:]) for y in (output_grad, x))
    gradient = conv_weight_grad(grads, images, geometry._replace(groups=geometry.groups * x.shape[0]))
    return gradient.view(*output_grad.shape[:2], *gradient.shape[1:])


def conv_weight_grad(output_grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The weight gradient of a convolution, (m, n / groups, *kernel), summed over the samples."""
    kernel, stride, padding, dilation, groups = geometry
    unused = geometry.unused(output_grad.shape[2:], x.shape[2:])
    if any(unused):
        output_grad = F.pad(output_grad, [y for number in reversed(unused) for y in (0, number)])
    weight, none = x.new_empty(1).expand(output_grad.shape[1], x.shape[1] // groups, *kernel), [0] * len(kernel)
    options = stride, padding, dilation, False, none, groups, (False, True, False)
    return torch.ops.aten.convolution_backward(output_grad, x, weight, None, *options)[1]


# The most bytes of unfolded inputs at a time. Copying so many takes a GPU some 40 us, many times as long as a launch,
# and the product that reads them fills the multiprocessors.
UNFOLDED_BYTES = 64 << 20


def unfolded(x: Tensor, places: Sequence[int], geometry: Geometry) -> Tensor:
    """The inputs that the weights of an output channel are multiplied by at each of the T places, (B, n * kernel, T).

    One operator copies a strided view of the padded input. `F.unfold` launches a kernel for every sample on CUDA, and
    takes longer on the CPU.
    """
    geometry.unused(places, x.shape[2:])
    kernel, stride, padding, dilation, _ = geometry
    if any(padding):
        x = F.pad(x, [number for number in reversed(padding) for _ in range(2)])
    per_sample, per_channel, *steps = x.stride()
    to_weight, to_place = ([a * b for a, b in zip(numbers, steps, strict=True)] for numbers in (dilation, stride))
    columns = x.as_strided((*x.shape[:2], *kernel, *places), (per_sample, per_channel, *to_weight, *to_place))
    return columns.reshape(len(x), -1, math.prod(places))


def conv_weight_grads_by_unfolding(output_grad: Tensor, x: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write per-sample weight gradients to `out`, (B, m, n / groups, *kernel), as products with unfolded inputs."""
    places, groups = output_grad.shape[2:], geometry.groups
    grads, images = output_grad.flatten(2).unflatten(1, (groups, -1)), x.unflatten(1, (groups, -1))
    weights = out.view(len(x), groups, grads.shape[2], images.shape[2], -1)
    # The bytes of the unfolded inputs of one sample and one channel of each group.
    each = groups * weights.shape[4] * math.prod(places) * x.itemsize
    channels = min(images.shape[2], max(1, UNFOLDED_BYTES // each))
    samples = max(1, UNFOLDED_BYTES // (each * channels))
    for e, some, gradients in zip(grads.split(samples), images.split(samples), weights.split(samples), strict=True):
        e = e.flatten(0, 1)
        for image, gradient in zip(some.split(channels, 2), gradients.split(channels, 3), strict=True):
            columns = unfolded(image.flatten(0, 1), places, geometry)
            torch.bmm(e, columns.mT, out=gradient.view(*e.shape[:2], columns.shape[1]))


# The fewest output channels of a block. Measured: with 8 channels of 256 it takes three times as long.
_CHANNELS = 32


def conv_blocks(output_grad: Tensor, x: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Per-sample weight gradients, a block of output channels at a time, in the accumulation dtype."""
    dtype = accumulate_dtype(x.dtype)
    output_grad, x = output_grad.to(dtype), x.to(dtype)
    each = x.shape[0] * x.shape[1] * math.prod(geometry.kernel)
    for some in output_grad.split(max(_CHANNELS, block_elements(x.device) // each), 1):
        yield conv_weight_grads_as_groups(some, x, geometry)
