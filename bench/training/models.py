"""Models on which a training step is timed, each with a batch of inputs and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import ARCHITECTURES, group_norm, wide_resnet

Example = tuple[nn.Module, Tensor, Tensor]


def loss(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., classes) with labels (...)."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def on_images(model: nn.Module, batch_size: int) -> Example:
    """A model with random images (B, 3, 32, 32) of ten classes."""
    return model, torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))


def mlp(batch_size: int = 128, layers: int = 3, width: int = 1024) -> Example:
    """Linear layers 784-width-...-width-10, with random inputs and labels."""
    modules = [nn.Linear(784, width), nn.ReLU()]
    for _ in range(layers - 2):
        modules += nn.Linear(width, width), nn.ReLU()
    model = nn.Sequential(*modules, nn.Linear(width, 10))
    return model, torch.randn(batch_size, 784), torch.randint(10, (batch_size,))


class Residual(nn.Module):
    """A pre-activation residual block with group normalisation."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, out)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.relu(self.norm2(out)))


def resnet(batch_size: int = 64) -> Example:
    blocks = Residual(16, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2)
    stem, head = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.Linear(128, 10)
    return on_images(nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), batch_size)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT with learned positions."""

    def __init__(self, vocabulary: int = 2048, width: int = 256, layers: int = 4, heads: int = 4, length: int = 128):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # The positions are expanded to a batch, because the peers need one in every layer.
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device).expand_as(x))
        return self.head(self.norm(self.blocks(x)))


def gpt() -> Example:
    return GPT(), torch.randint(2048, (16, 128)), torch.randint(2048, (16, 128))


def gpt2_small(dtype: torch.dtype) -> Example:
    """GPT-2 small without the tied head: 163 million weights."""
    model = GPT(50257, width=768, layers=12, heads=12, length=1024).to(dtype)
    return model, torch.randint(50257, (8, 1024)), torch.randint(50257, (8, 1024))


@dataclass(frozen=True)
class Case:
    """A model with a batch, how many of its samples are compared with float64, and whether it runs under autocast."""

    build: Callable[[], Example]
    samples: int = 8
    autocast: bool = False


def large_cases() -> dict[str, Case]:
    """Models that keep a GPU busy, by name."""
    return {
        "MLP 784-2048-2048-10, B = 256": Case(partial(mlp, 256, width=2048)),
        "ResNet-GN 0.3M, B = 128": Case(partial(resnet, 128)),
        "GPT-2 small's shape, autocast, B = 8": Case(partial(gpt2_small, torch.float32), 2, autocast=True),
        "GPT-2 small's shape, bfloat16, B = 8": Case(partial(gpt2_small, torch.bfloat16), 2),
    }


# The names of models of three kinds, a step of which takes less than half a second on two cores.
SMALL = "MLP 784-1024-1024-10, B = 128", "ResNet-GN 0.3M, B = 64", "GPT 4 x 256, T = 128, B = 16"


def cases(quick: bool, device: str = "cpu") -> dict[str, Case]:
    """All models by name."""
    found = dict(zip(SMALL, map(Case, (mlp, resnet, gpt)), strict=True))
    if quick:
        return {SMALL[0]: found[SMALL[0]]}
    found["WRN-16-4, GN, B = 64"] = Case(lambda: on_images(wide_resnet(16, 4, norm=group_norm), 64), 4)
    found |= large_cases() if device == "cuda" else {}
    for name, architecture in ARCHITECTURES.items():
        samples = 4 if architecture.weights < 2e7 else 2
        for kind, norm in {"GN": group_norm, "BN": nn.BatchNorm2d}.items():
            build = partial(architecture.build, norm=norm)
            found[f"{name}, {kind}, B = 32"] = Case(lambda build=build: on_images(build(), 32), samples)
    return found
