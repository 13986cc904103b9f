"""Question 7, second part: what methods gain over SGD by the size of the batch, with equal numbers of epochs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ..contests.columns import Layout
from ..contests.generalisation import MOMENTUM, question
from ..data import DIGITS
from ..question import Config, Scope

TRAININGS: dict[bool, Config] = {  # for digits, and for larger images
    True: {"model": "MLP", "samples": 1000},
    False: {"model": "MLP", "samples": 2048},
}
SIZES = {True: (16, 64, 256, 1000), False: (16, 64, 256, 1024)}
EPOCHS = 15
QUICK: Config = {"model": "small MLP", "samples": 100}
QUICK_SIZES = (20, 100)
LABELS = ("clean", "symmetric 0.4")
METHODS = ("SGD", "Spectral(0.5)", "Spectral(-0.5)", "exact Spectral(16)", "Ascent(0.3)", "SAM(0.1)", "AdamW")


def methods(scope: Scope) -> Iterator[Config]:
    """All methods for all data, labels and sizes of the batch."""
    names = METHODS[:2] if scope.quick else METHODS
    for data in scope.data[: 1 if scope.quick else None]:
        training = QUICK if scope.quick else TRAININGS[data == DIGITS]
        sizes = QUICK_SIZES if scope.quick else SIZES[data == DIGITS]
        for labels, size, method in product(LABELS[: 1 if scope.quick else None], sizes, names):
            setting = {"data": data, "labels": labels, "batch_size": size, "momentum": MOMENTUM, "method": method}
            yield training | setting | {"steps": EPOCHS * training["samples"] // size}


QUESTION = question(
    "Do gains over SGD grow or vanish with the size of the batch, in equal numbers of epochs?",
    methods,
    Layout(tables=("data", "labels"), columns=("batch_size",), measures={"accuracy": ""}),
)
