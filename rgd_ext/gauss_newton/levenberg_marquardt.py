"""The search for a step by which the loss falls: Levenberg-Marquardt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .cholesky import Singular
from .equations import Vector
from .problem import Problem
from .snapshot import Position

# A step that is rejected multiplies the damping by 2, and each one after it by twice what the one before did.
_TRIALS = 12
_GROWTH = 2.0
# The least that a step which is accepted multiplies the damping by.
_LEAST_CHANGE = 1 / 3
# The share of a step after which the residuals are evaluated for the geodesic acceleration.
_SHARE = 0.1
# The least damping, over the largest element of the diagonal that it is added to.
_LEAST_DAMPING = 1e-16


class Found(NamedTuple):
    """What a search has come to.

    Attributes:
        is_accepted: whether a step was taken; if not, the parameters are as before.
        trials: how many were tried.
        factor: what the damping of the last trial was multiplied by.
        next_factor: what to multiply the damping by for the next search.
        gain_ratio: by how much the loss fell, over what the linear model predicted.
        is_accelerated: whether the last trial had the geodesic acceleration.
    """

    is_accepted: bool
    trials: int
    factor: float
    next_factor: float
    gain_ratio: float
    is_accelerated: bool


def search(problem: Problem, position: Position, evaluate: Callable[[], Tensor], has_acceleration: bool) -> Found:
    """Move the parameters along a step by which the loss falls; leave them where they are if there is none.

    The damping follows the gain ratio as in H. B. Nielsen, Damping parameter in Marquardt's method, IMM-REP-1999-05.

    Args:
        problem: the problem where the parameters are.
        position: the parameters.
        evaluate: returns the residuals where the parameters are then.
        has_acceleration: whether to try the geodesic acceleration.

    Raises:
        Singular: if the equations have no solution for any damping that was tried.
    """
    factor, growth, tried, ratio, accelerated = 1.0, _GROWTH, 1.0, 0.0, False
    for trial in range(1, _TRIALS + 1):
        tried, ratio, accelerated = factor, 0.0, False
        try:
            step = problem.step(factor)
        except Singular:
            if trial == _TRIALS:
                raise
            factor, growth = factor * growth, growth * 2
            continue
        moved = problem.with_rates(step)
        predicted = problem.predicted(moved)
        if not any(s.any() for s in moved):  # a stationary point
            return Found(False, trial, factor, 1.0, 0.0, False)
        if not predicted > 0:  # too long a step, as with rates above 2, or that differ
            factor, growth = factor * growth, growth * 2
            continue
        correction = _correction(problem, position, evaluate, moved) if has_acceleration else None
        accelerated = correction is not None
        if correction is not None:
            moved = [s + c for s, c in zip(moved, correction, strict=True)]
        if not position.move(moved):
            return Found(False, trial, factor, 1.0, 0.0, accelerated)
        fall = problem.fall(moved, evaluate())
        ratio = fall / predicted
        if math.isfinite(fall) and fall > 0:
            change = max(_LEAST_CHANGE, 1 - (2 * min(ratio, 1.0) - 1) ** 3)
            return Found(True, trial, factor, factor * change, ratio, accelerated)
        position.restore()
        factor, growth = factor * growth, growth * 2
    return Found(False, _TRIALS, tried, 1.0, ratio, accelerated)


def _correction(problem: Problem, position: Position, evaluate: Callable[[], Tensor], step: Vector) -> Vector | None:
    position.move([_SHARE * s for s in step])
    residuals = evaluate()
    position.restore()
    return problem.geodesic_correction(step, _SHARE, residuals) if residuals.isfinite().all() else None


def least_factor(problem: Problem, damping: float) -> float:
    """The least factor of `damping` that leaves it above the rounding of what it is added to; at most 1."""
    return min(1.0, _LEAST_DAMPING * problem.equations.scale / damping)
