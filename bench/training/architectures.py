"""The architectures of the paper's Table 1, as their authors define them for images of 32 x 32 pixels.

All map inputs of shape (B, 3, H, W) to logits of shape (B, classes). `norm` makes a normalisation layer from a number
of channels: `nn.BatchNorm2d` as published, or `group_norm`, which has as many weights and does not mix samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with the most groups, up to 8, that divide `channels`."""
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class Residual(nn.Module):
    """conv-norm-relu-conv-norm, plus a strided shortcut without weights that appends channels of zeros ("option A")."""

    def __init__(self, channels: int, out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, out, stride), norm(out)
        self.conv2, self.norm2 = _conv(out, out), norm(out)
        self.stride, self.missing = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))
        return F.relu(out + shortcut)


class WideResidual(nn.Module):
    """norm-relu-conv-norm-relu-conv, plus a 1 x 1 convolution of the activation where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), _conv(channels, out, stride)
        self.norm2, self.conv2 = norm(out), _conv(out, out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        out = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class Dense(nn.Module):
    """norm-relu-conv, whose `growth` channels are appended to the input."""

    def __init__(self, channels: int, growth: int, norm: Norm) -> None:
        super().__init__()
        self.norm, self.conv = norm(channels), _conv(channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def resnet(depth: int = 110, *, classes: int = 10, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """He et al. (2016), arXiv:1512.03385, section 4.2: three stages of (depth - 2) / 6 blocks.

    Raises:
        ValueError: if the depth does not divide into stages.
    """
    blocks = _stages(Residual, [16, 16, 32, 64], _per_stage(depth, 2, 6), norm)
    return nn.Sequential(_conv(3, 16), norm(16), nn.ReLU(), *blocks, *_head(64, classes))


def wide_resnet(depth: int = 16, width: int = 8, *, classes: int = 10, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """Zagoruyko and Komodakis (2016), arXiv:1605.07146, without dropout: three stages of (depth - 4) / 6 blocks.

    Raises:
        ValueError: if the depth does not divide into stages.
    """
    widths = [16, 16 * width, 32 * width, 64 * width]
    blocks = _stages(WideResidual, widths, _per_stage(depth, 4, 6), norm)
    return nn.Sequential(_conv(3, 16), *blocks, norm(widths[-1]), nn.ReLU(), *_head(widths[-1], classes))


def densenet(depth: int = 40, growth: int = 12, *, classes: int = 10, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """Huang et al. (2016), arXiv:1608.06993, without bottleneck, compression and dropout: three dense blocks.

    Each block has (depth - 4) / 3 layers; a 1 x 1 convolution and average pooling lie between two blocks.

    Raises:
        ValueError: if the depth does not divide into blocks.
    """
    count, channels, layers = _per_stage(depth, 4, 3), 16, [_conv(3, 16)]
    for block in range(3):
        if block:
            layers += norm(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False), nn.AvgPool2d(2)
        layers += (Dense(channels + i * growth, growth, norm) for i in range(count))
        channels += count * growth
    return nn.Sequential(*layers, norm(channels), nn.ReLU(), *_head(channels, classes))


@dataclass(frozen=True)
class Architecture:
    """A network, its exact number of weights, and the number the paper prints."""

    build: Callable[[], nn.Module]
    weights: int
    paper: str


ARCHITECTURES = {
    "ResNet-110": Architecture(resnet, 1_727_962, "1.7 M"),
    "Wide ResNet-16-8": Architecture(wide_resnet, 10_961_370, "11 M"),
    "DenseNet-40 (k = 12)": Architecture(densenet, 1_019_722, "1 M"),
    "DenseNet-100 (k = 24)": Architecture(partial(densenet, 100, 24), 27_249_082, "27.2 M"),
}


def _conv(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


def _head(channels: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)


def _stages(block: Callable[..., nn.Module], widths: list[int], count: int, norm: Norm) -> Iterator[nn.Module]:
    """`count` blocks for each further width; all but the first stage begin with stride 2."""
    for stage, (channels, out) in enumerate(pairwise(widths)):
        yield block(channels, out, 2 if stage else 1, norm)
        yield from (block(out, out, 1, norm) for _ in range(count - 1))


def _per_stage(depth: int, outside: int, per_count: int) -> int:
    count, rest = divmod(depth - outside, per_count)
    if rest or count < 1:
        raise ValueError(f"depth is {depth}: pass {outside} plus a positive multiple of {per_count}")
    return count
