"""rgd_ext: the gradients by weights of one sample each, the Gramian, and the direction of RGD."""

from __future__ import annotations

from functools import partial

import torch

import rgd_ext

from ..problem import Problem, flat
from ..reference import FRACTION
from .found import Found, Package


class Only:
    """A rule that gives all of the weight to one sample."""

    needs = "norms"

    def __init__(self) -> None:
        self.index = 0

    def __call__(self, stats: rgd_ext.Statistics) -> torch.Tensor:
        weights = torch.zeros_like(stats.sample_norms)
        weights[self.index] = 1
        return weights


def backward(problem: Problem, handle: rgd_ext.Preconditioner) -> torch.Tensor:
    """What the capture writes for all parts of the batch, as for the mean of the losses."""
    problem.model.zero_grad()
    if problem.parts == 1:
        problem.loss(problem.model, problem.x, problem.y).backward()
    else:
        with handle.accumulate():
            for x, y in problem.batches():
                (problem.loss(problem.model, x, y) / problem.parts).backward()
    trained = problem.trained()
    scale = 1 if problem.reduction == "mean" else len(problem)
    return flat([p.grad for p in trained], trained) / scale


def captured(problem: Problem, batch_norm: str | None = None, unit: bool = False) -> Found:
    """With `unit`, the model is one function of a sample, under vmap or one sample at a time."""
    if unit:
        rgd_ext.register_rule(problem.model, rgd_ext.unit)
    options = {"batch_dim": problem.batch_dim} | ({"batch_norm": batch_norm} if batch_norm else {})
    rule = Only()
    rows = []
    with rgd_ext.precondition(problem.model, weights=rule, **options) as handle:
        for index in range(len(problem)):
            rule.index = index
            rows.append(backward(problem, handle))
    with rgd_ext.precondition(problem.model, epsilon=rgd_ext.Spectral(FRACTION), **options) as handle:
        direction = backward(problem, handle)
        scale = 1 if problem.reduction == "mean" else len(problem) ** 2
        gram = handle.stats.gram / scale
    return Found({"gradients": torch.stack(rows), "Gramian": gram, "direction": direction}, problem.model)


PACKAGE = Package(
    "rgd_ext",
    "direction, Gramian and gradients (by weights of one sample)",
    {
        "": captured,
        '`batch_norm="contribution"`': partial(captured, batch_norm="contribution"),
        "`register_rule(model, unit)`": partial(captured, unit=True),
    },
)
