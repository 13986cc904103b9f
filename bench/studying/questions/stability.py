"""Question 5: how fast methods fit a small training set, and with which learning rates, by the size of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ..contests.contest import Contest, Entry
from ..contests.losses import draw, final_loss, is_failure, larger_rates, numbers, table
from ..contests.tuning import grid
from ..data import DIGITS
from ..question import Answer, Config, Finished, Question, Scope, slug, without
from ..training import train

DATA = (DIGITS, "fashion-mnist")
BATCH_SIZES = (5, 50, 500)  # from a hundredth of the samples to all of them, the paper's own setting
TRAINING = {"samples": 500, "labels": "clean", "model": "MLP", "steps": 150, "evaluate": "test"}
QUICK = {"samples": 50, "labels": "clean", "model": "small MLP", "steps": 20, "evaluate": "test"}
MOMENTA = (0.0, 0.9)
METHODS = (
    "SGD",
    "Spectral(0.5)",
    "Spectral(0.9)",
    "Spectral(-0.5)",
    "Trace(0.5)",
    "Rayleigh(0.5)",
    "exact Spectral(1)",
    "exact Spectral(4)",
    "exact Spectral(16)",
    "exact Spectral(64)",
)
ADAMW = "AdamW"  # beside SGD with momentum, since it has a momentum of its own
LONGER = 2  # SGD is also trained with so many times the steps: about the time of the others
RATES = {0.0: grid(0.4), 0.9: grid(0.05)}
ADAMW_RATES = grid(0.004)
SEEDS = range(10)


CONTEST = Contest(
    first_rates=lambda base: ADAMW_RATES if base["method"] == ADAMW else RATES[base["momentum"]],
    scores=lambda outcome: (-final_loss(outcome),),
    fails=is_failure,
)


def settings(scope: Scope) -> Iterator[Config]:
    """Data, batch and momentum."""
    training, sizes = (QUICK, BATCH_SIZES[:2]) if scope.quick else (TRAINING, BATCH_SIZES)
    for data, size, momentum in product(DATA, sizes, MOMENTA):
        if data in scope.data and not (scope.quick and momentum):
            yield training | {"data": data, "batch_size": size, "momentum": momentum}


def methods(scope: Scope) -> Iterator[Config]:
    """All methods in all settings, and longer trainings of SGD."""
    for setting in settings(scope):
        names = METHODS[:2] if scope.quick else METHODS
        yield from (setting | {"method": method} for method in (*names, *[ADAMW] * (setting["momentum"] > 0)))
        yield setting | {"method": "SGD", "steps": LONGER * setting["steps"]}


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """For each method the search for its best rate, and all seeds at that rate."""
    seeds = SEEDS[:2] if scope.quick else SEEDS
    return [run for base in methods(scope) for run in CONTEST.plan(finished, base, seeds)]


def answer(finished: Finished) -> Answer:
    """Losses, rates and times by setting and method."""
    entries = CONTEST.entries(finished)

    def largest_rate(entry: Entry) -> float | None:
        return CONTEST.search(finished, without(entry.config, "lr")).largest

    data = dict.fromkeys(entry.config["data"] for entry in entries)
    tables = {
        f"table.{slug(name)}": table([entry for entry in entries if entry.config["data"] == name], largest_rate)
        for name in data
    }
    found = numbers(entries) | larger_rates(entries, largest_rate)
    return Answer(tables, {"losses": (lambda figure: draw(figure, entries), 7.0)}, found)


QUESTION = Question("Does a positive epsilon fit faster, or with larger learning rates?", plan, train, answer)
