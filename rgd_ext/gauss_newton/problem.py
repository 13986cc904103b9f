"""The least-squares problem of a step, linearised where the parameters are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .equations import Equations, Prior, Vector
from .report import Report

# The length of the acceleration over that of the velocity, up to which it is trusted.
_LONGEST_CORRECTION = 0.75


class Problem:
    """Half the sum of squared residuals, with weight decay, and what its linear model predicts.

    Steps s are subtracted from the parameters.

    Args:
        equations: for the step.
        groups: the parameter group of each parameter of the Jacobian.
        previous: the step before for each parameter, or None.

    Attributes:
        equations, groups: as given.
    """

    def __init__(
        self, equations: Equations, groups: Sequence[Mapping[str, Any]], previous: Sequence[Tensor | None]
    ) -> None:
        self.equations = equations
        self.groups, self._previous = groups, previous
        self._has_decay = any(group["weight_decay"] for group in groups)
        parameters = equations.jacobian.parameters
        self._values = [p.detach().clone() for p in parameters] if self._has_decay else [p.detach() for p in parameters]

    def report(
        self,
        damping: float,
        accepted: bool = True,
        trials: int = 1,
        gain_ratio: float | None = None,
        geodesic: bool = False,
    ) -> Report:
        """What a step has come to."""
        found = self.equations
        loss, rows = found.residuals.square().sum() / 2, found.jacobian.rows
        return Report(loss, rows, found.order, accepted, trials, damping, gain_ratio, geodesic, found.jitter)

    def step(self, factor: float = 1.0) -> Vector:
        """The s that minimises the linear model, with dampings times `factor`. Rates are not applied."""
        self.equations.factorise(self._prior(factor))
        return self.equations.step()

    def _prior(self, factor: float) -> Prior:
        metric = [factor * group["damping"] + group["weight_decay"] for group in self.groups]
        if not self._has_decay and not any(group["momentum"] for group in self.groups):
            return Prior(metric, None)
        centre = []
        for group, m, value, previous in zip(self.groups, metric, self._values, self._previous, strict=True):
            pull = group["weight_decay"] * value
            if group["momentum"] and previous is not None:
                pull = pull + factor * group["damping"] * group["momentum"] * previous
            centre.append(pull / m if m else pull)  # without damping and decay it is zero
        return Prior(metric, centre)

    def with_rates(self, step: Vector) -> Vector:
        """A step times the rates of the parameters."""
        return [group["lr"] * s for group, s in zip(self.groups, step, strict=True)]

    def predicted(self, step: Vector) -> float:
        """The reduction of the loss that the linear model predicts."""
        residuals, change = self.equations.residuals, self.equations.jacobian.times(step)
        return (residuals @ change - change @ change / 2 + self._fall_of_decay(step)).item()

    def fall(self, step: Vector, residuals: Tensor) -> float:
        """By how much the loss has fallen after a step, given the residuals there."""
        before = self.equations.residuals
        # A difference of the two sums would lose the digits of a small fall.
        return ((before - residuals) @ (before + residuals) / 2 + self._fall_of_decay(step)).item()

    def _fall_of_decay(self, step: Vector) -> Tensor:
        fall = torch.zeros_like(self.equations.residuals[0])
        for group, value, s in zip(self.groups, self._values, step, strict=True):
            if group["weight_decay"]:
                fall = fall + group["weight_decay"] * ((value - s / 2).double() * s).sum()
        return fall

    def geodesic_correction(self, step: Vector, share: float, residuals: Tensor) -> Vector | None:
        """Half the geodesic acceleration, J^+ r'' / 2, of a step for which the equations are factorised.

        r'' is the second derivative of the residuals along the step (M. Transtrum and J. Sethna, arXiv 1201.5885,
        section 3). None if it is too long.

        Args:
            step: with rates.
            share: the share of the step after which the residuals were evaluated.
            residuals: those there.
        """
        slope = self.equations.jacobian.times(step)
        second = 2 / share * ((residuals - self.equations.residuals) / share + slope)
        found = self.equations.correction(second / 2)
        if not 2 * _norm(found) <= _LONGEST_CORRECTION * _norm(step):
            return None
        return found


def _norm(vector: Vector) -> float:
    return torch.stack([v.double().norm() for v in vector]).norm().item()
