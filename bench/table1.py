"""Table 1 of the paper in exact numbers: weights d, samples N, and the bound N - 1 on the rank of D compared with d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .measuring.report import Section, show
from .training.architectures import ARCHITECTURES


@dataclass(frozen=True)
class Data:
    """The parts of a data set that are counted, and the N the paper prints."""

    parts: dict[str, int]
    paper: str

    @property
    def size(self) -> int:
        """N."""
        return sum(self.parts.values())


DATA = {
    "CIFAR": Data({"training": 50_000, "test": 10_000}, "60 K"),
    "SVHN": Data({"training": 73_257, "extra": 531_131}, "600 K"),
    "SVHN with test": Data({"training": 73_257, "extra": 531_131, "test": 26_032}, "600 K"),
}


def count(build: Callable[[], nn.Module]) -> int:
    """How many weights the network has; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def run() -> list[str]:
    """Print N and d; returns what disagrees with the counts written here."""
    counts = {name: count(architecture.build) for name, architecture in ARCHITECTURES.items()}
    show(("data", "N", "paper", "rank D at most", "what is counted"), [_data_rows()], "Samples")
    header = ("architecture", "d", "paper", *(f"rank / d, {name}" for name in DATA))
    show(header, [_architecture_rows(counts)], "Weights, and the most of their dimensions that D can span")
    wrong = {name: d for name, d in counts.items() if d != ARCHITECTURES[name].weights}
    return [f"{name} has {d:,} weights, not {ARCHITECTURES[name].weights:,}" for name, d in wrong.items()]


def _data_rows() -> Section:
    parts = {name: " + ".join(f"{size:,} {part}" for part, size in data.parts.items()) for name, data in DATA.items()}
    return [[name, f"{d.size:>7,}", d.paper, f"{d.size - 1:>7,}", parts[name]] for name, d in DATA.items()]


def _architecture_rows(counts: dict[str, int]) -> Section:
    return [
        [name, f"{d:>10,}", ARCHITECTURES[name].paper, *(f"{(data.size - 1) / d:>6.1%}" for data in DATA.values())]
        for name, d in counts.items()
    ]
