"""Question 5, second part: the descent that a policy promises to first order, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from ..contests.ratios import short
from ..data import DIGITS, Sources
from ..data.defects import described
from ..inference import Interval, mean
from ..question import Answer, Config, Finished, Question, Scope, Table
from ..ranges import ranges
from ..steps.descent import POLICIES, compare
from ..training import measured_along

POINTS = (0, 60, 200)  # steps of a training by SGD after which steps are compared
SHOWN = 60  # those of the table
LABELS = ("clean", "symmetric 0.4")
TRAINING = {"model": "MLP", "samples": 1000, "method": "SGD", "lr": 0.05, "momentum": 0.9, "batch_size": 50}
QUICK = {"model": "small MLP", "samples": 100, "batch_size": 20}
SEEDS = range(10)
QUANTITIES = {
    "epsilon": "eps lambda_max(D)",
    "slope": "slope",
    "epsilon of batches": "B = 50: eps lambda_max(D_B)",
    "slope of batches": "slope of the batch's loss",
    "slope of all": "slope of the loss of all samples",
    "gain": "decrease / SGD's",
}


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """All seeds of both kinds of labels, for each data set that is there; if quick, two seeds on few digits."""
    if scope.quick:
        training, seeds, data_sets = TRAINING | QUICK | {"steps": POINTS[1]}, SEEDS[:2], [DIGITS]
    else:
        training, seeds, data_sets = TRAINING | {"steps": POINTS[-1]}, SEEDS, scope.data
    return [
        training | {"data": data, "labels": labels, "seed": seed}
        for seed, data, labels in product(seeds, data_sets, LABELS)
    ]


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """What `compare` gives at the `POINTS`, as lists."""
    return measured_along(config, sources, POINTS, compare)


def answer(finished: Finished) -> Answer:
    """Epsilons, slopes and gains after `SHOWN` steps, with intervals over the seeds.

    The numbers are the least and the largest of means over the seeds: of all settings and steps, such as
    slope.spectral_0_5.least, of those at one step, such as slope.spectral_0_5.60.least, and of those with one kind of
    labels at one step, such as slope.spectral_0_5.60.clean.least.
    """
    rows, values = [], []
    for data, labels, step, policy, means in settings(finished):
        if step == SHOWN:
            rows.append([data, described(labels), policy, *(each.text() for each in means.values())])
        values += [((quantity, policy, step, labels), each.mean) for quantity, each in means.items()]
    table = Table(("data", "labels", "policy", *QUANTITIES.values()), rows)
    others = [(key, value) for key, value in values if key[0] != "gain"]
    gains = [(key, value) for key, value in values if key[0] == "gain"]  # which may be less than a hundredth
    return Answer({"table": table}, numbers=ranges(others, shortest=2) | ranges(gains, shortest=2, text=short))


def settings(finished: Finished) -> Iterator[tuple[str, str, int, str, dict[str, Interval]]]:
    """Data, labels, step and policy, with the means of the quantities over the seeds."""
    for (data, labels, steps), lines in finished.grouped("data", "labels", "steps").items():
        for at, step in enumerate(step for step in POINTS if step <= steps):
            for policy in POLICIES:
                means = {name: mean([line.outcome[f"{name} {policy}"][at] for line in lines]) for name in QUANTITIES}
                yield data, labels, step, policy, means


QUESTION = Question("What descent does a policy promise, and what comes of it?", plan, run, answer)
