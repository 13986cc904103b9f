"""The cost of a step of RGD and of SGD as the batch, or the depth of the network, grows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from .measuring.report import Record, Section, show
from .measuring.selection import chosen
from .measuring.timing import Samples, host_clock, interleave, ratio_text, synchronize
from .training import models
from .training.architectures import group_norm, resnet
from .training.arms import OURS, Training
from .training.growth import Series, draw

HEADER = ("cost against", "", "SGD ms", "RGD ms", "RGD / SGD (quartiles)")
ARMS = {"SGD": OURS["SGD"], "RGD": OURS["RGD Spectral"]}
BATCH_SIZES = (16, 32, 64, 128, 256, 512)
ROUNDS, QUICK_ROUNDS = 5, 2
POINT_TIME = 6_000  # milliseconds


def series() -> list[Series]:
    """The networks whose batch grows, and those whose depth grows."""

    def deep_resnet(depth: int) -> models.Example:
        return models.on_images(resnet(depth, norm=group_norm), 16)

    return [
        Series("MLP 784-1024-1024-10", "B", models.mlp, BATCH_SIZES),
        Series("ResNet-GN 0.3M", "B", models.resnet, BATCH_SIZES),
        Series("MLP 784-512-...-10, B = 128", "layers", partial(models.mlp, 128, width=512), (2, 4, 8, 16, 32)),
        Series("ResNet-GN of Table 1's kind, B = 16", "layers", deep_resnet, (8, 14, 20, 32, 56)),
    ]


def measure(build: Callable[[], models.Example], device: str, rounds: int) -> Samples:
    """Times of a step by arm. Each follows another step of the same arm, which is not timed."""
    model, x, y = (part.to(device) for part in build())
    trainings = {name: Training(arm, model, x, y) for name, arm in ARMS.items()}
    timed = {name: host_clock(one, 1, synchronize(device), settle=one) for name, one in trainings.items()}
    first = interleave(timed, 1, warm_up=0)
    price = sum(times[0] for times in first.values())
    return interleave(timed, max(QUICK_ROUNDS, min(rounds, int(POINT_TIME / price))), warm_up=0)


def section(row: Series) -> Section:
    """Rows of a table: one for each size, and a last one with the exponents."""
    rows = []
    for size, samples in row.milliseconds.items():
        times = [f"{statistics.median(samples[arm]):.2f}" for arm in ARMS]
        rows.append(["" if rows else row.name, f"{row.grows} = {size}", *times, ratio_text(samples, "RGD", "SGD")])
    return [*rows, ["", "grows as", *(f"{row.grows}^{row.exponent(arm):.2f}" for arm in ARMS), ""]]


def run(device: str, quick: bool, json: str | None, plot: str | None, only: Sequence[str]) -> list[str]:
    """Run the series that `only` chooses, print tables, write raw samples and a plot; returns what failed."""
    record = Record(json, "scaling", device)
    torch.manual_seed(0)
    rows = list(chosen({row.name: row for row in series()}, only).values())
    for row in rows:
        row.sizes = row.sizes[:2] if quick else row.sizes
        for size in row.sizes:
            rounds = QUICK_ROUNDS if quick else ROUNDS
            row.milliseconds[size] = measure(partial(row.build, size), device, rounds)
        show(HEADER, [section(row)], f"scaling, {device}")
    record.write(series=[{"name": row.name, "grows": row.grows, "milliseconds": row.milliseconds} for row in rows])
    if plot:
        draw(rows, plot)
    return []
