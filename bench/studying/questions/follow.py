"""Question 1: whether eq. (10) describes SGD, with the mean of many paths against flows, on small problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

from ..data import Sources
from ..following import curves, problems
from ..following.figure import draw
from ..following.paths import SHUFFLED, WITH_REPLACEMENT
from ..following.problems import Problem
from ..following.shares import settings
from ..following.summary import numbers
from ..following.tables import flows, fractions, shuffled
from ..question import Answer, Config, Finished, Question, Scope

PROBLEMS: dict[str, Callable[[int, Sources], Problem]] = {
    "quadratic, constant D": lambda seed, _: problems.quadratic(seed),
    "least squares": lambda seed, _: problems.least_squares(seed),
    "logistic regression": lambda seed, _: problems.logistic_regression(seed),
    "tanh neuron": lambda seed, _: problems.tanh_neuron(seed),
    "small MLP": problems.small_mlp,
    "small CNN": problems.small_cnn,
}
PATHS = dict.fromkeys(PROBLEMS, 2000) | {"small MLP": 200, "small CNN": 200}
# All samples in one batch: plain gradient descent, of which one path is enough.
SAMPLINGS = [
    *((WITH_REPLACEMENT, size) for size in curves.BATCH_SIZES if size < problems.SAMPLES),
    *((SHUFFLED, size) for size in curves.BATCH_SIZES),
]
SEEDS = range(10)


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """All settings of a problem and seed in turn, since they share the integrations of flows."""
    if scope.quick:
        return [
            configuration(problem, 0, 0.25, sampling, size, 100)
            for problem in ("least squares", "logistic regression")
            for sampling, size in ((WITH_REPLACEMENT, 8), (SHUFFLED, 8), (SHUFFLED, problems.SAMPLES))
        ]
    return [
        configuration(problem, seed, rate, sampling, size, PATHS[problem])
        for seed, problem, rate, (sampling, size) in product(SEEDS, PROBLEMS, curves.RATES, SAMPLINGS)
    ]


def configuration(problem: str, seed: int, rate: float, sampling: str, batch_size: int, paths: int) -> Config:
    """`lr` is the learning rate times lambda_max(H(x0))."""
    return {
        "problem": problem,
        "seed": seed,
        "lr": rate,
        "sampling": sampling,
        "batch_size": batch_size,
        "paths": paths if batch_size < problems.SAMPLES else 1,
    }


@lru_cache(maxsize=2)
def problem_of(name: str, seed: int, sources: Sources) -> Problem:
    """The same object for all settings, as the curves that they share are kept for it."""
    return PROBLEMS[name](seed, sources)


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """Squared distances of the mean of SGD from the curves, averaged over the times, and what they are to be seen with.

    They are unbiased estimates and may be negative. `noise` is what was subtracted for the finite number of paths, and
    `length` the distance that the gradient flow goes from its start to its end.
    """
    problem = problem_of(config["problem"], config["seed"], sources)
    rate, size = config["lr"], config["batch_size"]
    mean = curves.sgd(problem, rate, size, config["sampling"], config["paths"], config["seed"])
    found = curves.relatives(problem)
    modified = curves.modified_flows(problem)
    squared = {
        "gradient flow": found.gradient,
        "gradient descent": curves.gradient_descent(problem, rate),
        "modified, gradient descent": modified[rate, problem.size],
        "modified, shuffled SGD": modified[rate, size],
        **{f"speed {speed:g}": curve for speed, curve in found.rescaled.items()},
        **{f"c {c:+g}": curve for c, curve in found.spectral.items()},
        **{f"constant c {c:+g}": curve for c, curve in found.constant.items()},
    }
    return {
        "squared_distances": {
            name: None if curve is None else finite(mean.squared_distance(curve)) for name, curve in squared.items()
        },
        "noise": finite(mean.noise.mean().item()),
        "length": (found.gradient[-1] - problem.x0).norm().item(),
        "loss_at_start": problem.mean(problem.x0).item(),
        "loss_at_end": finite(problem.mean(mean.mean[-1]).item()),
        "absolute_lr": curves.learning_rate(problem, rate),
        "steps": curves.steps(problem, rate)[0],
        "largest_eigenvalue": found.largest_eigenvalue,
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def answer(finished: Finished) -> Answer:
    """How much of the distance between the gradient flow and SGD each flow explains, by setting."""
    found = settings(finished)
    tables = {"fractions": fractions(found), "flows": flows(found), "shuffled": shuffled(found)}
    return Answer(tables, {"fractions": (lambda figure: draw(figure, found), 6.5)}, numbers(found))


QUESTION = Question("Does eq. (10) follow SGD?", plan, run, answer)
