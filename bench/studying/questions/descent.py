"""Question 5, second part: the descent that a policy promises to first order, and what comes of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ..contests.ratios import short
from ..data import DIGITS, Sources
from ..data.defects import described
from ..descent import POLICIES, compare
from ..inference import mean
from ..question import Answer, Config, Finished, Question, Scope, Table, slug
from ..task import task_of
from ..training import models_along

POINTS = (0, 60, 200)  # steps of a training by SGD after which steps are compared
SHOWN = 60  # those of the table
LABELS = ("clean", "symmetric 0.4")
TRAINING = {
    "model": "MLP",
    "samples": 1000,
    "method": "SGD",
    "lr": 0.05,
    "momentum": 0.9,
    "batch_size": 50,
    "steps": POINTS[-1],
}
QUICK = {"model": "small MLP", "samples": 100, "batch_size": 20, "steps": POINTS[1]}
SEEDS = range(10)
MEANS = {
    "epsilon": "eps lambda_max(D)",
    "slope": "slope",
    "epsilon of batches": "B = 50: eps lambda_max(D_B)",
    "slope of batches": "slope of the batch's loss",
    "slope beyond": "slope of the loss of all samples",
    "gain": "decrease / SGD's",
}


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """All seeds of both kinds of labels, for each data set that is there; if quick, two seeds on few digits."""
    seeds, data_sets = (SEEDS[:2], [DIGITS]) if scope.quick else (SEEDS, scope.data)
    return [
        TRAINING | {"data": data, "labels": labels, "seed": seed} | (QUICK if scope.quick else {})
        for seed, data, labels in product(seeds, data_sets, LABELS)
    ]


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """What `compare` gives at the `POINTS`, as lists."""
    task = task_of(config | {"evaluate": "test"}, sources)
    generator = torch.Generator().manual_seed(config["seed"])  # not one of `seeds_of`, which the training uses
    found = [compare(model, task.train, generator) for model in models_along(config, task, POINTS)]
    return {name: [each[name] for each in found] for name in found[0]}


def answer(finished: Finished) -> Answer:
    """Epsilons, slopes and gains by setting, with intervals over the seeds.

    The numbers are the least and the largest of means over the seeds: of all settings and steps, such as
    slope.spectral_0_5.least, of those at one step, such as slope.spectral_0_5.60.least, and of those with one kind of
    labels at one step, such as slope.spectral_0_5.60.clean.least.
    """
    rows, means = [], {}
    for (data, labels), lines in finished.grouped("data", "labels").items():
        for at, step in enumerate(step for step in POINTS if step <= lines[0].config["steps"]):
            for name in POLICIES:
                of_name = {each: mean([line.outcome[f"{each} {name}"][at] for line in lines]) for each in MEANS}
                for each, interval in of_name.items():
                    for length in (2, 3, 4):
                        means.setdefault((each, name, step, labels)[:length], []).append(interval.mean)
                if step == SHOWN:
                    cells = [interval.text("{:.2f}".format) for interval in of_name.values()]
                    rows.append([data, described(labels), name, *cells])
    numbers = {
        slug(*key, word): short(of(values)) if key[0] == "gain" else f"{of(values):.2f}"
        for key, values in means.items()
        for word, of in (("least", min), ("largest", max))
    }
    table = Table(("data", "labels", "policy", *MEANS.values()), rows)
    return Answer({"table": table}, numbers=numbers)


QUESTION = Question("What descent does a policy promise, and what comes of it?", plan, run, answer)
