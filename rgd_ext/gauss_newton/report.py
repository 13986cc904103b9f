"""What a step has done."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Report(NamedTuple):
    """What a step of `GaussNewton` has done.

    Attributes:
        loss: half the sum of squared residuals before the step, without weight decay, a scalar.
        rows: the number of residuals.
        order: the number of unknowns of the linear system that was solved: that of the residuals, or of the weights.
        accepted: with `adaptive`, whether a trial was accepted; else True.
        trials: how many steps were tried; 1 without `adaptive`.
        damping: that of the step which was accepted, or tried last, in the first group.
        gain_ratio: by how much the loss fell, over what the linear model predicted; None without `adaptive`.
        geodesic: whether the step includes the geodesic acceleration.
        jitter: what was added to the diagonal of the system to factorise it, normally 0.
    """

    loss: Tensor
    rows: int
    order: int
    accepted: bool
    trials: int
    damping: float
    gain_ratio: float | None
    geodesic: bool
    jitter: float | Tensor
