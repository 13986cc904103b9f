"""Question 2: the diffusion matrix and the Hessian along trainings, with clean and with wrong labels."""

from __future__ import annotations

from itertools import product
from typing import Any

from ..curvature.comparison import POINTS, compare
from ..curvature.summary import draw, numbers, settings, table
from ..data import DIGITS, Sources
from ..question import Answer, Config, Finished, Question, Scope
from ..training import measured_along

# The Hessian of a large convolutional network would take minutes at each point.
MODELS = {DIGITS: ("small MLP", "small CNN"), "fashion-mnist": ("MLP",)}
LABELS = ("clean", "symmetric 0.4")
TRAINING = {"samples": 1000, "method": "SGD", "lr": 0.05, "momentum": 0.9, "batch_size": 50}
SEEDS = range(10)


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """All seeds of both kinds of labels, for each data set that is there and its models."""
    models = [(data, model) for data in scope.data for model in MODELS.get(data, ())]
    seeds, points = SEEDS, POINTS
    if scope.quick:
        models, seeds, points = models[:1], range(2), POINTS[:3]
    return [
        TRAINING | {"data": data, "model": model, "labels": labels, "seed": seed, "steps": points[-1]}
        for seed in seeds
        for (data, model), labels in product(models, LABELS)
    ]


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """What `compare` gives at the `POINTS`, as lists."""
    return measured_along(config, sources, POINTS, lambda model, samples, _: compare(model, samples))


def answer(finished: Finished) -> Answer:
    """Cosines, multiples and eigenvalues by setting and step, with intervals over the seeds."""
    found = settings(finished)
    return Answer({"table": table(found)}, {"curves": (lambda figure: draw(figure, found), 8.5)}, numbers(found))


QUESTION = Question("Is the diffusion matrix close to the Hessian along a training?", plan, run, answer)
