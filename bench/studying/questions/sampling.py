"""Question 7, first part: D of a batch beside D of the data set, by the size of the batch."""

from __future__ import annotations

from itertools import product
from typing import Any

from ..data import DIGITS, Sources
from ..question import Answer, Config, Finished, Question, Scope
from ..sampling.comparison import POINTS, compare
from ..sampling.figure import draw
from ..sampling.settings import ALL, settings
from ..sampling.summary import numbers, ratio_table, similarities
from ..training import measured_along

SAMPLES = {DIGITS: 1000, "fashion-mnist": 4096}
LABELS = ("clean", "symmetric 0.4")
TRAINING = {"model": "MLP", "method": "SGD", "lr": 0.05, "momentum": 0.9, "batch_size": 50, "steps": POINTS[-1]}
QUICK = {"model": "small MLP", "batch_size": 20, "steps": POINTS[1], "samples": 100}
SEEDS = range(10)


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """All seeds of both kinds of labels, for each data set that is there; if quick, two seeds on few digits."""
    seeds, data_sets = (SEEDS[:2], [DIGITS]) if scope.quick else (SEEDS, scope.data)
    return [
        TRAINING
        | {"data": data, "samples": SAMPLES[data], "labels": labels, "seed": seed}
        | (QUICK if scope.quick else {})
        for seed, data, labels in product(seeds, data_sets, LABELS)
        if data in SAMPLES
    ]


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """What `compare` gives at the `POINTS`, as lists."""
    return measured_along(config, sources, POINTS, compare)


def answer(finished: Finished) -> Answer:
    """D of the batches by setting, and what steps with it gain, with intervals over the seeds."""
    found = settings(finished)
    tables = {
        "similarities": similarities(found),
        "gains": ratio_table(found, lambda each: each.gains),
        "over_batch": ratio_table([each for each in found if each.size_name != ALL], lambda each: each.over_batch),
    }
    return Answer(tables, {"curves": (lambda figure: draw(figure, found), 11.0)}, numbers(found))


QUESTION = Question("Do gains vanish with small batches because of their D?", plan, run, answer)
