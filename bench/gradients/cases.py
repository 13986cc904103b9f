"""The gradients that are measured on: one (B, d) tensor, or tensors of the shapes of two known networks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measuring.inputs import dtype_name

BATCH_SIZES = (4, 8, 16, 32, 128, 512, 1024)
WEIGHTS = (10**4, 10**5, 10**6, 10**7, 3 * 10**7)
DTYPES = (torch.float32, torch.bfloat16)
ALIGNMENT = 512  # bytes, as torch's allocator aligns tensors


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The parameters of a ResNet-50 on ImageNet: 25,557,032 weights in 161 tensors."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def gpt2_small_shapes() -> list[tuple[int, ...]]:
    """The parameters of GPT-2 small, tied head: 124,439,808 weights in 148 tensors."""
    width = 768
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(12 * [*norm, *attention, *norm, *feed_forward]), *norm]


@dataclass(frozen=True)
class Case:
    """Per-sample gradients in tensors of the given numbers of weights."""

    what: str
    batch_size: int
    sizes: list[int]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.what}, B = {self.batch_size}, {dtype_name(self.dtype)}"

    @property
    def weights(self) -> int:
        return sum(self.sizes)

    @property
    def bytes(self) -> int:
        return self.batch_size * self.weights * self.dtype.itemsize

    @property
    def many(self) -> bool:
        return len(self.sizes) > 1


@dataclass
class Buffer:
    """Random gradients: the (B, n) tensors of a case, and one (B, sum of n) tensor in the same memory."""

    tensors: list[Tensor]
    flat: list[Tensor]


def fill(case: Case, device: str) -> Buffer:
    """Random gradients for a case, with a mean that is not small beside their spread."""
    item = case.dtype.itemsize
    lengths = [case.batch_size * size for size in case.sizes]
    padded = [math.ceil(length * item / ALIGNMENT) * ALIGNMENT // item for length in lengths]
    memory = torch.randn(sum(padded), dtype=case.dtype, device=device).add_(0.1)
    chunks = [chunk[:length] for chunk, length in zip(memory.split(padded), lengths, strict=True)]
    return Buffer(
        [chunk.view(case.batch_size, -1) for chunk in chunks],
        [memory[: sum(lengths)].view(case.batch_size, -1)],
    )


def cases(max_bytes: int, quick: bool) -> list[Case]:
    """All cases whose G fits into `max_bytes`. The networks have the most of 16, 8 or 4 samples that fit."""
    networks = {"ResNet-50": resnet50_shapes(), "GPT-2 small": gpt2_small_shapes()}
    if quick:
        networks = {"GPT-2 attention": gpt2_small_shapes()[2:8]}
    found = []
    for what, shapes in networks.items():
        for dtype in DTYPES:
            lists = [Case(what, b, [math.prod(shape) for shape in shapes], dtype) for b in (16, 8, 4)]
            found += [case for case in lists if case.bytes <= max_bytes][:1]
    batch_sizes, weights = ((16, 128), (10**4, 10**5)) if quick else (BATCH_SIZES, WEIGHTS)
    flat = [Case(f"d = {d:.0e}", b, [d], dtype) for b in batch_sizes for d in weights for dtype in DTYPES]
    return found + [case for case in flat if case.bytes <= max_bytes]
