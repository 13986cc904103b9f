"""Question 5: how fast methods fit a small training set, and with which learning rates, by the size of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from ..data import DIGITS, Sources
from ..fits import Fit, draw, numbers, table
from ..question import Answer, Config, Finished, Question, Scope
from ..step_times import step_seconds
from ..training import train
from ..tuning import FACTOR, grid, search

DATA = (DIGITS, "fashion-mnist")
BATCH_SIZES = (5, 50, 500)  # from a hundredth of the samples to all of them, the paper's own setting
TRAINING = {"samples": 500, "labels": "clean", "model": "MLP", "steps": 150, "evaluate": "test"}
QUICK = {"samples": 50, "labels": "clean", "model": "small MLP", "steps": 20, "evaluate": "test"}
MOMENTA = (0.0, 0.9)
METHODS = (
    "SGD",
    "AdamW",
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
LONGER = 2  # SGD is also trained with so many times the steps: about the time of the others
RATES = {0.0: grid(0.4), 0.9: grid(0.05)}
ADAMW_RATES = grid(0.004)
SEEDS, TUNING_SEEDS = range(10), (100, 101)
ROUNDS = 20
TIMES = "all"  # instead of a method: the run that measures times


def settings(scope: Scope) -> Iterator[Config]:
    """Data, batch and momentum."""
    training, sizes = (QUICK, BATCH_SIZES[:2]) if scope.quick else (TRAINING, BATCH_SIZES)
    for data, size, momentum in product(DATA, sizes, MOMENTA):
        if data in scope.data and not (scope.quick and momentum):
            yield training | {"data": data, "batch_size": size, "momentum": momentum}


def methods(setting: Config, quick: bool) -> Iterator[Config]:
    """All methods in a setting, and longer trainings of SGD."""
    for method in METHODS[:3] if quick else METHODS:
        if not (method == "AdamW" and setting["momentum"]):
            yield setting | {"method": method}
    yield setting | {"method": "SGD", "steps": LONGER * setting["steps"]}


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """For each method the search for its best rate, all seeds at that rate, and larger rates until none trains.

    The times of steps come last, in one run, so that nothing else is running.
    """
    runs: list[Config] = []
    for setting in settings(scope):
        for base in methods(setting, scope.quick):
            searching, lr = tuned(finished, base)
            runs += searching
            if lr is not None:
                runs += at_best_rate(base, lr, scope.quick)
                runs += limit(finished, base, lr)[0]
    if any(run not in finished for run in runs):
        return runs
    return [*runs, {"method": TIMES, "data": " ".join(scope.data), "quick": scope.quick}]


def at_best_rate(base: Config, lr: float, quick: bool) -> list[Config]:
    """The runs that the answer is about."""
    return [base | {"lr": lr, "seed": seed} for seed in SEEDS[: 2 if quick else None]]


def tuned(finished: Finished, base: Config) -> tuple[list[Config], float | None]:
    """The runs of the search, and the rate with the smallest training loss once they are finished."""
    rates = ADAMW_RATES if base["method"] == "AdamW" else RATES[base["momentum"]]
    return search(finished, base, rates, TUNING_SEEDS, lambda outcome: -final_loss(outcome))


def limit(finished: Finished, base: Config, lr: float) -> tuple[list[Config], float | None]:
    """The runs from the best rate upwards until one does not train, and the largest that does, once they are finished.

    A rate trains if with each tuning seed the loss at the end is below that at the start.
    """
    runs: list[Config] = []
    while True:
        larger = FACTOR * lr
        of_rate = [base | {"lr": larger, "seed": seed} for seed in TUNING_SEEDS]
        runs += of_rate
        if any(run not in finished for run in of_rate):
            return runs, None
        if not all(final_loss(finished[run].outcome) < finished[run].outcome["initial_loss"] for run in of_rate):
            return runs, lr
        lr = larger


def final_loss(outcome: dict[str, Any]) -> float:
    """Over the whole training set, at the end; infinite if the training diverged."""
    return math.inf if outcome["training_loss"] is None else outcome["training_loss"]


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """A training; or, by data, batch size and method, the time of a step in units of that of SGD."""
    if config["method"] != TIMES:
        return train(config, sources)
    scope = Scope(config["quick"], config["data"].split())
    found: dict[str, Any] = {}
    for setting in settings(scope):
        if not setting["momentum"]:
            times = {
                base["method"]: step_seconds(base | {"seed": 0}, sources, ROUNDS)["ratio"]
                for base in methods(setting, scope.quick)
                if base["steps"] == setting["steps"]
            }
            found.setdefault(setting["data"], {})[str(setting["batch_size"])] = times
    return found


def fits(finished: Finished) -> list[Fit]:
    """What was finished, by setting and method."""
    quick = all(line.config.get("samples") == QUICK["samples"] for line in finished if "samples" in line.config)
    (times,) = [line.outcome for line in finished.where(method=TIMES)] or [{}]
    found = []
    for setting in settings(Scope(quick, list(times))):
        for base in methods(setting, quick):
            _, lr = tuned(finished, base)
            outcomes = [finished[run].outcome for run in at_best_rate(base, lr, quick)]
            longer = base["steps"] > setting["steps"]
            found.append(
                Fit(
                    setting["data"],
                    setting["batch_size"],
                    setting["momentum"],
                    f"SGD, {LONGER} x the steps" if longer else base["method"],
                    lr,
                    limit(finished, base, lr)[1],
                    [outcome["training_loss"] for outcome in outcomes],
                    [100 * outcome["accuracy"] for outcome in outcomes],
                    times[setting["data"]][str(setting["batch_size"])][base["method"]] * (LONGER if longer else 1),
                )
            )
    return found


def answer(finished: Finished) -> Answer:
    """Losses, rates and times by setting and method."""
    found = fits(finished)
    data = dict.fromkeys(fit.data for fit in found)
    tables = {f"table.{name}": table([fit for fit in found if fit.data == name]) for name in data}
    return Answer(tables, {"losses": (lambda figure: draw(figure, found), 7.0)}, numbers(found))


QUESTION = Question("Does a positive epsilon fit faster, or with larger learning rates?", plan, run, answer)
