"""Question 3: accuracy after training on wrong labels, and on clean ones, by method."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from ..contests.contest import Contest
from ..contests.rankings import draw, numbers, tables
from ..contests.tuning import grid
from ..data import Sources
from ..methods import METHODS
from ..question import Answer, Config, Finished, Question, Scope
from ..step_times import TIMES, ratios
from ..training import train

TRAININGS: tuple[Config, ...] = (
    {"data": "digits", "samples": 1000, "model": "MLP", "batch_size": 50, "steps": 600},
    {"data": "digits", "samples": 1000, "model": "CNN", "batch_size": 50, "steps": 400},
    {"data": "fashion-mnist", "samples": 4000, "model": "MLP", "batch_size": 64, "steps": 930},
    {"data": "fashion-mnist", "samples": 2000, "model": "CNN", "batch_size": 64, "steps": 465},
)
QUICK: Config = {"data": "digits", "samples": 100, "model": "small MLP", "batch_size": 20, "steps": 20}
LABELS = ("clean", "symmetric 0.2", "symmetric 0.4", "pairwise 0.4")
MOMENTUM = 0.9
# Those for unequal classes belong to another question, and a step of UPGrad takes 10 to 30 times as long as one of SGD.
LEFT_OUT = {"class weights", "focal loss(2)", "UPGrad"}
LONGER = 2  # SGD is also trained with so many times the steps: about the time of SAM


def first_rates(base: Config) -> list[float]:
    """Around rates at which the methods train well on digits."""
    if base["method"] == "AdamW":
        return grid(0.002)
    return grid(0.05 if base["momentum"] else 0.4)


CONTEST = Contest(first_rates, lambda outcome: outcome["accuracy"], in_search={"evaluate": "validation"})


def methods(scope: Scope) -> Iterator[Config]:
    """All methods for all trainings and labels, SGD also without momentum, and with more steps."""
    trainings, names = ((QUICK,), list(METHODS)[:3]) if scope.quick else (TRAININGS, METHODS)
    for training, labels in product(trainings, LABELS[-2:] if scope.quick else LABELS):
        if training["data"] in scope.data:
            base = training | {"labels": labels, "momentum": MOMENTUM, "evaluate": "test"}
            yield from (base | {"method": method} for method in names if method not in LEFT_OUT)
            yield base | {"method": "SGD", "momentum": 0.0}
            yield base | {"method": "SGD", "steps": LONGER * training["steps"]}


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """For each method the search for its best rate on the validation samples, and all seeds at that rate.

    The times of steps come last, in one run, so that nothing else is running.
    """
    seeds = range(2 if scope.quick else 10)
    runs = [run for base in methods(scope) for run in CONTEST.plan(finished, base, seeds)]
    if any(run not in finished for run in runs):
        return runs
    return [*runs, {"method": TIMES, "data": " ".join(scope.data), "quick": scope.quick}]


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """A training, or the times of steps."""
    if config["method"] == TIMES:
        return ratios(methods(Scope(config["quick"], config["data"].split())), sources)
    return train(config, sources)


def answer(finished: Finished) -> Answer:
    """Accuracies by training, labels and method."""
    entries = CONTEST.entries(finished)
    return Answer(tables(entries), {"accuracies": (lambda figure: draw(figure, entries), 14.0)}, numbers(entries))


QUESTION = Question("Which methods train well on wrong labels, and on clean ones?", plan, run, answer)
