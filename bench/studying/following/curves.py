"""All curves that SGD on a problem is compared with, for all settings, since they share integrations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from .flows import Relativistic, integrate, modified
from .paths import SHUFFLED, Average, average
from .problems import Problem

# c of the flows with eps = +-c / lambda_max(D).
MAGNITUDES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9)
FRACTIONS = (*(-c for c in reversed(MAGNITUDES)), *MAGNITUDES)
# Speeds of the gradient flow, a control: a positive c, too, makes the flow along g slower.
SPEEDS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2.0)
# Learning rates times lambda_max(H(x0)), and batch sizes, for which there are modified flows.
RATES = (0.1, 0.25, 1.0)
BATCH_SIZES = (2, 8, 32, 64)
TIMES = 20  # equally spaced, the last one is T
PATH_SEEDS = 1000  # of the batches; those below are for the data and the start


def learning_rate(problem: Problem, rate: float) -> float:
    return rate / problem.sharpness


def steps(problem: Problem, rate: float) -> tuple[int, int]:
    """The steps until T, and those between two times."""
    total = round(problem.duration / rate)
    return total, total // TIMES


def times(problem: Problem) -> Tensor:
    """t_1 to t_20 = T, as (20,)."""
    return torch.arange(1, TIMES + 1, dtype=torch.float64) * (problem.duration / problem.sharpness / TIMES)


@dataclass(frozen=True)
class Relatives:
    """The gradient flow and the flows of eq. (10), each (T, d).

    Attributes:
        gradient: dx/dt = -g.
        rescaled: dx/dt = -s g, by the speed s.
        spectral: with eps = c / lambda_max(D(x)), by c.
        constant: with eps = c / lambda_max(D(x0)), by c; None where it left the bounds of eq. (6).
        largest_eigenvalue: lambda_max(D(x0)).
    """

    gradient: Tensor
    rescaled: dict[float, Tensor]
    spectral: dict[float, Tensor]
    constant: dict[float, Tensor | None]
    largest_eigenvalue: float


@lru_cache(maxsize=2)
def relatives(problem: Problem) -> Relatives:
    count = len(FRACTIONS)
    fractions = torch.tensor((*(0.0,) * (1 + len(SPEEDS)), *FRACTIONS, *FRACTIONS), dtype=torch.float64)
    speeds = torch.tensor((1.0, *SPEEDS, *(1.0,) * (2 * count)), dtype=torch.float64)
    velocity = Relativistic(problem, fractions, torch.arange(len(fractions)) >= len(fractions) - count, speeds)
    gradient, *rest = integrate(velocity, problem.x0, len(fractions), times(problem))
    rescaled, spectral, constant = rest[: len(SPEEDS)], rest[len(SPEEDS) : -count], rest[-count:]
    inside = [None if stopped else curve for curve, stopped in zip(constant, velocity.stopped[-count:], strict=True)]
    by_speed = dict(zip(SPEEDS, rescaled, strict=True))
    return Relatives(gradient, by_speed, by_fraction(spectral), by_fraction(inside), velocity.largest_at_start.item())


def by_fraction(curves: Iterable[Tensor | None]) -> dict[float, Tensor | None]:
    return dict(zip(FRACTIONS, curves, strict=True))


@lru_cache(maxsize=2)
def modified_flows(problem: Problem) -> dict[tuple[float, int], Tensor]:
    """By rate and batch size, the flow of SGD in shuffled epochs, (T, d); the whole batch has that of gradient descent.

    See `flows.modified`.
    """
    settings = list(product(RATES, BATCH_SIZES))
    n = problem.size
    lr = torch.tensor([learning_rate(problem, rate) for rate, _ in settings], dtype=torch.float64)
    share = torch.tensor([(n - size) / ((n - 1) * size) for _, size in settings], dtype=torch.float64)
    curves = integrate(modified(problem, lr, share), problem.x0, len(settings), times(problem))
    return dict(zip(settings, curves, strict=True))


@lru_cache(maxsize=len(RATES))
def gradient_descent(problem: Problem, rate: float) -> Tensor:
    """Steps along -g, (T, d)."""
    return sgd(problem, rate, problem.size, SHUFFLED, 1, 0).mean


def sgd(problem: Problem, rate: float, batch_size: int, sampling: str, paths: int, seed: int) -> Average:
    """The mean of independent paths of SGD at `times`."""
    return average(
        problem, learning_rate(problem, rate), batch_size, sampling, paths, *steps(problem, rate), PATH_SEEDS + seed
    )
