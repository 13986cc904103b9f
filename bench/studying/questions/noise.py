"""Question 6: how well the noise scale is known from batches, and how well it predicts the critical batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..data import DIGITS, Samples, Sources
from ..noise import accuracy, critical, estimates, predictions
from ..noise.branches import branch
from ..noise.figure import draw
from ..noise.scales import Scales, gramian, scales, signs
from ..noise.searches import SIZES, branches
from ..noise.trunk import POINTS, checkpoint_of
from ..question import Answer, Config, Finished, Question, Scope

SEEDS = range(10)  # of the trunks
SAMPLES, DRAWS = 1000, 1000
ENDS_OF = 32  # samples; the noise scales are also computed where the branches of this batch size end
PROBES = 40  # for tr(H Sigma), whose estimate then has a standard error of about 8 %


@dataclass(frozen=True)
class Branched:
    """Steps of a trunk after which there are branches, how far they go, and the rate to begin their search with."""

    steps: tuple[int, ...]
    rate: float
    goal: float = critical.USUAL_GOAL


# By data, model and labels. With wrong labels, branches of small batches would take ten times as long.
TRUNKS: dict[tuple[str, str, str], tuple[Branched, ...]] = {
    (DIGITS, "MLP", "clean"): (Branched(POINTS, 0.25), Branched(POINTS[1:2], 0.25, goal=0.5)),
    (DIGITS, "MLP", "symmetric 0.4"): (),
    (DIGITS, "small CNN", "clean"): (Branched(POINTS[1:], 1.0),),
    ("fashion-mnist", "MLP", "clean"): (Branched(POINTS[:2], 0.1),),
    ("fashion-mnist", "MLP", "symmetric 0.4"): (),
}
QUICK = {(DIGITS, "small MLP", "clean"): (Branched(POINTS[:1], 0.5),)}


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """Of each trunk, the estimates at all points, and the searches for the best rates of its branches."""
    trunks, seeds, points, sizes, samples, draws = TRUNKS, SEEDS, POINTS, SIZES, SAMPLES, DRAWS
    if scope.quick:
        trunks, seeds, points, sizes, samples, draws = QUICK, range(2), POINTS[:1], SIZES[1:], 100, 100
    runs: list[Config] = []
    for seed, ((data, model, labels), branched) in product(seeds, trunks.items()):
        trunk = {"data": data, "model": model, "labels": labels, "samples": samples, "seed": seed}
        if data in scope.data:
            runs += [trunk | {"part": "estimates", "step": step, "draws": draws} for step in points]
            for each in branched:
                for step in each.steps:
                    base = trunk | {"step": step, "goal": each.goal}
                    runs += branches(finished, base, each.rate, sizes)
    return runs


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """What the part of the configuration gives: "estimates", or a branch, for a "search" or for what comes out of it.

    Returns:
        Of estimates the `scales`, the `running` noise scale of the trunk, and the `errors` by batch size. Of a branch
        the `steps` after which it reaches its goal, and its last `loss`; None if it does not, or it is not finite. If
        it is the one to look at, also the means of the `scales` over the `ends` of its paths.
    """
    start = checkpoint_of(config, sources)
    if config["part"] == "estimates":
        gram = gramian(start.model, start.samples)
        generator = torch.Generator().manual_seed(config["seed"])
        errors = {str(size): estimates.errors(gram, size, config["draws"], generator) for size in estimates.BATCH_SIZES}
        probes = signs(PROBES, len(gram), config["seed"])
        return scales(start.model, start.samples, gram, probes) | {"running": start.running, "errors": errors}
    found = branch(start.model, start.samples, config)
    outcome: dict[str, Any] = {"steps": found.steps, "loss": found.loss}
    if config["part"] == "branch" and config["batch_size"] == ENDS_OF and found.steps is not None:
        outcome["ends"] = mean_scales(found.ends, start.samples, config["seed"])
    return outcome


def mean_scales(models: Sequence[nn.Module], samples: Samples, seed: int) -> Scales:
    """The means of the `scales` over models."""
    probes = signs(PROBES, len(samples), seed).chunk(len(models))
    found = [scales(each, samples, gramian(each, samples), part) for each, part in zip(models, probes, strict=True)]
    return {name: fmean(each[name] for each in found) for name in found[0]}


def answer(finished: Finished) -> Answer:
    """Errors by estimator, batches until the noise scale is known, and critical batch sizes with their predictions."""
    points, settings = accuracy.points(finished), predictions.settings(finished)
    tables = {
        "estimators": accuracy.by_estimator(points),
        "points": accuracy.by_point(points),
        "critical": critical.table(settings),
    }
    counted = finished.grouped("part").get(("branch",), [])
    unreached = {"unreached": str(sum(line.outcome["steps"] is None for line in counted))}
    numbers = accuracy.numbers(points) | critical.numbers(settings) | unreached
    return Answer(tables, {"scales": (lambda figure: draw(figure, points, settings), 4.5)}, numbers)


QUESTION = Question(
    "How well is the noise scale known, and does it predict the critical batch size?", plan, run, answer
)
