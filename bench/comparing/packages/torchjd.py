"""TorchJD: the Gramian of the samples' gradients by autogram, and the gradients by autojac."""

from __future__ import annotations

from functools import partial

import torch

from ..problem import Problem, flat_rows
from .found import AbsentError, Found, Package


def gramian(problem: Problem, batch_dim: int | None = 0) -> Found:
    """The Gramian by the engine of autogram."""
    from torchjd.autogram import Engine

    if problem.parts > 1:
        raise AbsentError("the Gramian of a union has inner products between its batches")
    engine = Engine(problem.model, batch_dim=batch_dim)
    losses = problem.losses(problem.model, problem.x, problem.y)
    return Found({"Gramian": engine.compute_gramian(losses)}, problem.model)


def jacobian(problem: Problem) -> Found:
    """The gradients by autojac, one row at a time, which works for every function that autograd differentiates."""
    from torchjd import autojac

    rows = []
    for x, y in problem.batches():
        autojac.backward(problem.losses(problem.model, x, y), parallel_chunk_size=1)
        rows.append(flat_rows([p.jac for p in problem.trained()]))
        for parameter in problem.trained():
            del parameter.jac
    return Found({"gradients": torch.cat(rows)}, problem.model)


PACKAGE = Package(
    "torchjd",
    "Gramian",
    {"": gramian, "`batch_dim=None`": partial(gramian, batch_dim=None), "autojac, with gradients": jacobian},
)
