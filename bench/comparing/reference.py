"""What the packages should find: per-sample gradients by plain autograd, and what follows from them."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..training import oracle
from .problem import Problem, flat, flat_rows, probes

FRACTION = 0.5  # of Spectral
SAMPLES = ""  # the name of the gradients of samples that the model sees one at a time
# Other things that a package may take for the gradients of samples.
CONTRIBUTIONS, JACOBIAN, TOKENS = "contributions", "Jacobian", "tokens"


def rows_by_meaning(problem: Problem, mixes: bool) -> dict[str, Tensor]:
    """G by what its rows are.

    Args:
        problem: as the packages get it.
        mixes: whether the model couples the samples of a batch, so that there are three meanings: the gradient of a
            sample alone, what the sample contributes to the gradient of the batch, and the gradient of its loss in
            the batch.
    """
    found = {SAMPLES: problem.rows()}
    if mixes:
        found[CONTRIBUTIONS] = contributions(problem)
        found[JACOBIAN] = jacobian(problem)
    if problem.y.ndim > 1:
        found[TOKENS] = tokens(problem)
    return found


def contributions(problem: Problem) -> Tensor:
    """B times what each sample contributes to the gradient of the batch."""
    grads = oracle.contributions(copy.deepcopy(problem.model), problem.x, problem.y, oracle.Sides())
    return flat_rows(grads)


def jacobian(problem: Problem) -> Tensor:
    """The gradient of the loss of each sample in the batch."""
    trained = problem.trained()
    losses = problem.losses(problem.model, problem.x, problem.y)
    return torch.stack([flat(torch.autograd.grad(loss, trained, retain_graph=True), trained) for loss in losses])


def tokens(problem: Problem) -> Tensor:
    """The gradient of the loss of each label, where a sample has many."""
    trained, losses = problem.trained(), []
    for i in range(len(problem)):
        output = problem.model(problem.x.narrow(problem.batch_dim, i, 1))[0]
        losses.extend(F.cross_entropy(output, problem.y[i], reduction="none"))
    return torch.stack([flat(torch.autograd.grad(loss, trained, retain_graph=True), trained) for loss in losses])


def expected(kind: str, rows: Tensor, problem: Problem) -> Tensor:
    """One of the results of a package, from the rows of G."""
    if kind == "gradients":
        return rows
    if kind == "Gramian":
        return rows @ rows.T
    if kind == "direction":
        return oracle.direction([rows], "Spectral", FRACTION)[0]
    if kind == "empirical Fisher":
        scale = len(rows) if problem.reduction == "mean" else 1
        return rows.T @ (rows @ probes(problem.trained())) / scale
    raise ValueError(f"unknown result {kind!r}")


def error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|; infinite where the shapes differ, or a number is not finite."""
    if got.shape != wanted.shape:
        return math.inf
    found = float((got.double() - wanted.double()).norm() / wanted.double().norm())
    return found if math.isfinite(found) else math.inf
