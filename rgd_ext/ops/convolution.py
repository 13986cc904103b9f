"""Operators on the weight gradients of convolutions, for every sample by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..convolutions import Geometry, conv_blocks, conv_weight_grads_as_groups
from .checks import check_groups, checked_grads
from .library import LIBRARY, register_default, register_fake
from .results import empty_gramian, empty_statistic

_CONVOLUTION = "Tensor output_grad, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation"

LIBRARY.define(f"conv_weight_grads({_CONVOLUTION}, int groups, Tensor(a!) out) -> ()")


@register_fake("conv_weight_grads")
def _(
    output_grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out: Tensor,
) -> None:
    return None


@register_default("conv_weight_grads")
def default_conv_weight_grads(
    output_grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out: Tensor,
) -> None:
    """Each sample's own weight gradient, into `out`, (B, m, n / groups, *kernel)."""
    out.copy_(conv_weight_grads_as_groups(output_grad, x, Geometry(kernel, stride, padding, dilation, groups)))


def conv_weight_grads(
    output_grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Per-sample gradients of a convolution's weight: for each sample, what backward would sum over all of them.

    For one dimension and group: h_i[o, c, k] = sum_t output_grad[i, o, t] x[i, c, stride t + dilation k - padding].

    Args:
        output_grad: shape (B, m, *output), with one, two or three dimensions of space.
        x: shape (B, n, *space), of the same dtype and device.
        kernel, stride, padding, dilation: one number per dimension of space; padding is with zeros, on both sides.
        groups: divides m and n.

    Returns:
        (B, m, n / groups, *kernel), contiguous. For a transposed convolution, `output_grad` and `x` change places.

    Raises:
        ValueError, TypeError: as `moments`; ValueError if the shapes are not those of a convolution.
    """
    checked_grads([output_grad, x])
    _check_convolution(output_grad, x, Geometry(kernel, stride, padding, dilation, groups))
    out = x.new_empty(*output_grad.shape[:2], x.shape[1] // groups, *kernel)
    torch.ops.rgd_ext.conv_weight_grads(output_grad, x, kernel, stride, padding, dilation, groups, out)
    return out


def _check_convolution(output_grad: Tensor, x: Tensor, geometry: Geometry) -> None:
    space = x.ndim - 2
    if not 1 <= space <= 3 or output_grad.ndim != x.ndim:
        raise ValueError(
            f"output_grad has shape {tuple(output_grad.shape)} and x {tuple(x.shape)}: pass (B, m, *output) and"
            " (B, n, *space) with one to three dimensions of space"
        )
    for name, numbers in zip(("kernel", "stride", "padding", "dilation"), geometry[:4], strict=True):
        least = 0 if name == "padding" else 1
        if len(numbers) != space or any(number < least for number in numbers):
            raise ValueError(f"{name} is {tuple(numbers)}: pass one number for each of {space} dimensions of space")
    check_groups(geometry.groups, output_grad.shape[1], x.shape[1])
    sizes = zip(x.shape[2:], output_grad.shape[2:], geometry.places(x.shape[2:]), *geometry[:4], strict=True)
    for size, places, most, k, s, p, d in sizes:
        if not 1 <= places <= most:
            raise ValueError(
                f"output_grad has {places} places along a dimension of {size} with kernel {k}, stride {s}, padding {p}"
                f" and dilation {d}: pass at least 1 and at most {most}"
            )


LIBRARY.define(f"conv_gram({_CONVOLUTION}) -> Tensor")


@register_fake("conv_gram")
def _(
    output_grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    return empty_gramian(x)


@register_default("conv_gram")
def default_conv_gram(
    output_grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The Gramian of each sample's own weight gradient, (B, B), of which some are formed at a time."""
    geometry = Geometry(kernel, stride, padding, dilation, 1)
    return sum(torch.ops.rgd_ext.gram([block]) for block in conv_blocks(output_grad, x, geometry))


LIBRARY.define(f"conv_scalar_moments({_CONVOLUTION}) -> (Tensor, Tensor, Tensor)")


@register_fake("conv_scalar_moments")
def _(
    output_grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = empty_statistic(x)
    return statistic.new_empty(()), statistic, torch.empty_like(statistic)


@register_default("conv_scalar_moments")
def default_conv_scalar_moments(
    output_grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`scalar_moments` of each sample's own weight gradient, of which some are formed at a time."""
    geometry = Geometry(kernel, stride, padding, dilation, 1)
    parts = [torch.ops.rgd_ext.scalar_moments([block]) for block in conv_blocks(output_grad, x, geometry)]
    squared_grad_norm, alignments, squared_norms = (reduce(torch.add, same) for same in zip(*parts, strict=True))
    return squared_grad_norm, alignments, squared_norms
