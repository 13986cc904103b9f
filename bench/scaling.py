"""The cost of a step of RGD and of SGD as the batch, or the depth of the network, grows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from . import models
from .architectures import group_norm, resnet
from .environment import clocks
from .measure import Samples, host_clock, interleave, ratio_text, synchronize
from .report import Section, show, write_json
from .selection import chosen
from .training_steps import OURS, Training

HEADER = ("cost against", "", "SGD ms", "RGD ms", "RGD / SGD (quartiles)")
ARMS = {"SGD": OURS["SGD"], "RGD": OURS["RGD Spectral"]}
BATCH_SIZES = (16, 32, 64, 128, 256, 512)
ROUNDS, QUICK_ROUNDS = 5, 2
POINT_TIME = 6_000  # milliseconds


@dataclass
class Series:
    """Steps of one kind of network, by what grows."""

    name: str
    grows: str
    build: Callable[[int], models.Example]
    sizes: tuple[int, ...]
    milliseconds: dict[int, Samples] = field(default_factory=dict)

    def medians(self, arm: str) -> list[float]:
        """Milliseconds by size."""
        return [statistics.median(samples[arm]) for samples in self.milliseconds.values()]

    def exponent(self, arm: str) -> float:
        """p of a cost that grows as size^p, fitted to the three largest sizes."""
        logs = ([math.log(value) for value in values[-3:]] for values in (self.sizes, self.medians(arm)))
        return statistics.linear_regression(*logs).slope


def series() -> list[Series]:
    """Batch sizes and depths."""

    def deep_resnet(depth: int) -> models.Example:
        return models.on_images(resnet(depth, norm=group_norm), 16)

    return [
        Series("MLP 784-1024-1024-10", "B", models.mlp, BATCH_SIZES),
        Series("ResNet-GN 0.3M", "B", models.resnet, BATCH_SIZES),
        Series("MLP 784-512-...-10, B = 128", "layers", partial(models.mlp, 128, width=512), (2, 4, 8, 16, 32)),
        Series("ResNet-GN of Table 1's kind, B = 16", "layers", deep_resnet, (8, 14, 20, 32, 56)),
    ]


def measure(build: Callable[[], models.Example], device: str, rounds: int) -> Samples:
    """Times of a step by arm, each after one of the same arm."""
    model, x, y = (part.to(device) for part in build())
    trainings = {name: Training(arm, model, x, y) for name, arm in ARMS.items()}
    timed = {name: host_clock(one, 1, synchronize(device), settle=one) for name, one in trainings.items()}
    first = interleave(timed, 1, warm_up=0)
    price = sum(times[0] for times in first.values())
    return interleave(timed, max(QUICK_ROUNDS, min(rounds, int(POINT_TIME / price))), warm_up=0)


def section(row: Series) -> Section:
    """Rows of a table, a size each; the last are the exponents."""
    rows = []
    for size, samples in row.milliseconds.items():
        times = [f"{statistics.median(samples[arm]):.2f}" for arm in ARMS]
        rows.append(["" if rows else row.name, f"{row.grows} = {size}", *times, ratio_text(samples, "RGD", "SGD")])
    return [*rows, ["", "grows as", *(f"{row.grows}^{row.exponent(arm):.2f}" for arm in ARMS), ""]]


def run(device: str, quick: bool, json: str | None, plot: str | None, only: Sequence[str]) -> list[str]:
    """Run the series that `only` chooses, print tables, write raw samples and a plot; returns what failed."""
    before = clocks()
    torch.manual_seed(0)
    rows = list(chosen({row.name: row for row in series()}, only).values())
    for row in rows:
        row.sizes = row.sizes[:2] if quick else row.sizes
        for size in row.sizes:
            rounds = QUICK_ROUNDS if quick else ROUNDS
            row.milliseconds[size] = measure(partial(row.build, size), device, rounds)
        show(HEADER, [section(row)], f"scaling, {device}")
    if json:
        records = [{"name": row.name, "grows": row.grows, "milliseconds": row.milliseconds} for row in rows]
        write_json(json, {"benchmark": "scaling", "device": device, "series": records}, before)
    if plot:
        from .growth import draw

        draw(rows, plot)
    return []
