"""Question 4: unequal classes, and groups that a contrast misleads about, by method."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ..contests.columns import Layout
from ..contests.generalisation import MOMENTUM, question
from ..data import DIGITS
from ..question import Config, Scope

TRAININGS: dict[bool, tuple[Config, ...]] = {  # for digits, and for larger images
    True: (
        {"model": "MLP", "samples": 1000, "batch_size": 50, "steps": 300},
        {"model": "CNN", "samples": 1000, "batch_size": 50, "steps": 300},
    ),
    False: ({"model": "MLP", "samples": 4000, "batch_size": 64, "steps": 480},),
}
QUICK: Config = {"model": "small MLP", "samples": 500, "batch_size": 20, "steps": 20}
IMBALANCED = "imbalanced 50"
DEFECTS = (IMBALANCED, "contrast 0.95")
CLASS_WEIGHTS = "class weights"  # which are equal where the classes are
METHODS = (
    "SGD",
    "AdamW",
    "Spectral(0.5)",
    "Spectral(0.9)",
    "Spectral(-0.5)",
    "Trace(0.5)",
    "Rayleigh(0.5)",
    "exact Spectral(16)",
    "Ascent(0.1)",
    "Ascent(0.3)",
    "SAM(0.1)",
    "clipping (median)",
    "truncation(0.2)",
    "label smoothing(0.1)",
    "re-weighting(1)",
    "re-weighting(3)",
    CLASS_WEIGHTS,
    "focal loss(2)",
)


def methods(scope: Scope) -> Iterator[Config]:
    """All methods for all trainings and defects, but class weights where all classes have the same size."""
    for data in scope.data[: 1 if scope.quick else None]:
        trainings = (QUICK,) if scope.quick else TRAININGS[data == DIGITS]
        for training, labels, method in product(trainings, DEFECTS, METHODS[:2] if scope.quick else METHODS):
            if method != CLASS_WEIGHTS or labels == IMBALANCED:
                yield training | {"data": data, "labels": labels, "momentum": MOMENTUM, "method": method}


QUESTION = question(
    "Which methods train well on unequal classes, and on groups that a contrast misleads about?",
    methods,
    Layout(
        tables=("data", "model"),
        columns=("labels",),
        measures={"balanced_accuracy": "balanced accuracy", "worst_accuracy": "worst class or group"},
    ),
    measure="balanced_accuracy",
)
