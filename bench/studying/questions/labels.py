"""Question 3: accuracy after training on wrong labels, and on clean ones, by method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from ..contests.accuracies import draw, numbers, tables
from ..contests.contest import Contest
from ..contests.tuning import grid
from ..data import DIGITS
from ..methods import METHODS
from ..question import Answer, Config, Finished, Question, Scope
from ..training import train

TRAININGS: dict[bool, tuple[Config, ...]] = {  # for digits, and for larger images
    True: (
        {"model": "MLP", "samples": 1000, "batch_size": 50, "steps": 600},
        {"model": "CNN", "samples": 1000, "batch_size": 50, "steps": 400},
    ),
    False: (
        {"model": "MLP", "samples": 4000, "batch_size": 64, "steps": 930},
        {"model": "CNN", "samples": 2000, "batch_size": 64, "steps": 465},
    ),
}
QUICK: Config = {"model": "small MLP", "samples": 100, "batch_size": 20, "steps": 20}
LABELS = ("clean", "symmetric 0.2", "symmetric 0.4", "pairwise 0.4")
MOMENTUM = 0.9
# Those for unequal classes belong to another question, and a step of UPGrad takes 10 to 30 times as long as one of SGD.
LEFT_OUT = {"class weights", "focal loss(2)", "UPGrad"}
LONGER = 2  # SGD is also trained with so many times the steps: about the time of SAM
SEEDS = range(12)  # with ten, no p-value would be small enough for Holm's correction


def first_rates(base: Config) -> list[float]:
    """Around rates at which the methods train well on digits."""
    if base["method"] == "AdamW":
        return grid(0.002)
    return grid(0.05 if base["momentum"] else 0.4)


def scores(outcome: dict[str, Any]) -> Sequence[float]:
    """The accuracy on the validation samples, and their loss."""
    return outcome["accuracy"], -math.inf if outcome["loss"] is None else -outcome["loss"]


CONTEST = Contest(first_rates, scores, in_search={"evaluate": "validation"})


def methods(scope: Scope) -> Iterator[Config]:
    """All methods for all trainings and labels, SGD also without momentum, and with more steps."""
    names = list(METHODS)[:3] if scope.quick else list(METHODS)
    for data in scope.data[: 1 if scope.quick else None]:
        trainings = (QUICK,) if scope.quick else TRAININGS[data == DIGITS]
        for training, labels in product(trainings, LABELS[-2:] if scope.quick else LABELS):
            base = training | {"data": data, "labels": labels, "momentum": MOMENTUM, "evaluate": "test"}
            yield from (base | {"method": method} for method in names if method not in LEFT_OUT)
            yield base | {"method": "SGD", "momentum": 0.0}
            yield base | {"method": "SGD", "steps": LONGER * training["steps"]}


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """For each method the search for its best rate on the validation samples, and all seeds at that rate."""
    seeds = SEEDS[:2] if scope.quick else SEEDS
    return [run for base in methods(scope) for run in CONTEST.plan(finished, base, seeds)]


def answer(finished: Finished) -> Answer:
    """Accuracies by training, labels and method."""
    entries = CONTEST.entries(finished)
    return Answer(tables(entries), {"accuracies": (lambda figure: draw(figure, entries), 14.0)}, numbers(entries))


QUESTION = Question("Which methods train well on wrong labels, and on clean ones?", plan, train, answer)
