"""Question 3: accuracy after training on wrong labels, and on clean ones, by method."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ..contests.columns import Layout
from ..contests.generalisation import MOMENTUM, question
from ..data import DIGITS
from ..methods import METHODS
from ..question import Config, Scope

TRAININGS: dict[bool, tuple[Config, ...]] = {  # for digits, and for larger images
    True: (
        {"model": "MLP", "samples": 1000, "batch_size": 50, "steps": 600},
        {"model": "CNN", "samples": 1000, "batch_size": 50, "steps": 400},
    ),
    False: (
        {"model": "MLP", "samples": 4000, "batch_size": 64, "steps": 930},
        {"model": "CNN", "samples": 1000, "batch_size": 50, "steps": 400},
    ),
}
QUICK: Config = {"model": "small MLP", "samples": 100, "batch_size": 20, "steps": 20}
LABELS: dict[bool, tuple[str, ...]] = {
    True: ("clean", "symmetric 0.2", "symmetric 0.4", "pairwise 0.4"),
    False: ("clean", "symmetric 0.4", "pairwise 0.4"),
}
QUICK_LABELS = LABELS[True][-2:]
LEFT_OUT = {"class weights", "focal loss(2)"}  # they are for unequal classes, which is another question
# A step takes 10 to 30 times as long as one of SGD, so it is compared in two settings only.
UPGRAD, WITH_UPGRAD = "UPGrad", {(DIGITS, "MLP", labels) for labels in ("clean", "symmetric 0.4")}
# A step of the CNN on larger images takes four times as long as one of the MLP, so only these are compared there.
FEWER = {
    "SGD",
    "AdamW",
    "Spectral(0.5)",
    "exact Spectral(16)",
    "exact Spectral(64)",
    "Ascent(0.3)",
    "SAM(0.1)",
    "SAM(0.3)",
    "clipping (median)",
    "truncation(0.4)",
}
LONGER = 2  # SGD is also trained with so many times the steps: about the time of SAM


def methods(scope: Scope) -> Iterator[Config]:
    """The methods for all trainings and labels, SGD also without momentum, and with more steps."""
    for data in scope.data[: 1 if scope.quick else None]:
        trainings = (QUICK,) if scope.quick else TRAININGS[data == DIGITS]
        for training, labels in product(trainings, QUICK_LABELS if scope.quick else LABELS[data == DIGITS]):
            base = training | {"data": data, "labels": labels, "momentum": MOMENTUM}
            names = compared(data, training["model"], labels)
            yield from (base | {"method": method} for method in names[: 3 if scope.quick else None])
            yield base | {"method": "SGD", "momentum": 0.0}
            yield base | {"method": "SGD", "steps": LONGER * training["steps"]}


def compared(data: str, model: str, labels: str) -> list[str]:
    """The methods for a model, data and labels, in the order of the catalogue."""
    left_out = LEFT_OUT if (data, model, labels) in WITH_UPGRAD else {*LEFT_OUT, UPGRAD}
    wanted = FEWER if model == "CNN" and data != DIGITS else METHODS.keys() - left_out
    return [name for name in METHODS if name in wanted]


QUESTION = question(
    "Which methods train well on wrong labels, and on clean ones?",
    methods,
    Layout(tables=("data", "model"), columns=("labels",), measures={"accuracy": ""}),
)
