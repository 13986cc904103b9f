"""The critical batch sizes that branches have, and the noise scales that predict them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..inference import Interval, mean
from ..question import Finished, Line
from .hyperbola import Hyperbola, fitted

FEWEST_SIZES = 3  # for a fit of two numbers


@dataclass(frozen=True)
class Trunk:
    """The branches from a checkpoint of one trunk.

    Attributes:
        steps: at the best rate, by batch size.
        fit: to these.
        start: what the estimates at the checkpoint gave.
        ends: the `scales` at the ends of branches of one batch size, if they are known.
    """

    steps: dict[int, float]
    fit: Hyperbola
    start: dict[str, Any]
    ends: dict[str, Any] | None


@dataclass(frozen=True)
class Setting:
    """The trunks of one kind with branches from the same step to the same goal."""

    data: str
    model: str
    labels: str
    step: int
    goal: float
    trunks: Sequence[Trunk]

    def critical(self) -> Interval:
        return over_trunks([trunk.fit.critical for trunk in self.trunks])

    def fewest(self) -> Interval:
        """The steps with the largest batches."""
        return over_trunks([trunk.fit.minimum for trunk in self.trunks])

    def ratios(self, predictor: str) -> list[float]:
        """The predicted critical batch sizes over the measured ones, of those trunks that have a prediction."""
        pairs = [(PREDICTORS[predictor](trunk), trunk.fit.critical) for trunk in self.trunks]
        return [predicted / measured for predicted, measured in pairs if predicted is not None]


def simple(scales: dict[str, Any]) -> float:
    """tr Sigma / |mu|^2, eq. (2.9) of S. McCandlish et al. (2018)."""
    return scales["trace"] / scales["squared_norm"]


def with_hessian(scales: dict[str, Any]) -> float | None:
    """tr(H Sigma) / mu^T H mu, eq. (2.8); None where one of them is not positive, and the model has no best step."""
    if min(scales["hessian_trace"], scales["curvature"]) <= 0:
        return None
    return scales["hessian_trace"] / scales["curvature"]


PREDICTORS: dict[str, Callable[[Trunk], float | None]] = {
    "simple": lambda trunk: simple(trunk.start),
    "Hessian": lambda trunk: with_hessian(trunk.start),
    "running": lambda trunk: trunk.start["running"],
    "simple, end": lambda trunk: trunk.ends and simple(trunk.ends),
    "Hessian, end": lambda trunk: trunk.ends and with_hessian(trunk.ends),
}


def settings(finished: Finished) -> list[Setting]:
    """Those with a trunk whose branches reach their goal with enough batch sizes, by name."""
    parts = {part: lines for (part,), lines in finished.grouped("part").items()}
    starts = {_checkpoint(line): line.outcome for line in parts.get("estimates", [])}
    branches: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for line in parts.get("branch", []):
        if line.outcome["steps"] is not None:
            of_trunk = branches.setdefault((*_checkpoint(line), line.config["goal"]), {})
            of_trunk[line.config["batch_size"]] = line.outcome
    grouped: dict[tuple[Any, ...], list[Trunk]] = {}
    for (*checkpoint, goal), of_trunk in branches.items():
        if len(of_trunk) >= FEWEST_SIZES and tuple(checkpoint) in starts:
            steps = {size: outcome["steps"] for size, outcome in of_trunk.items()}
            ends = next((outcome["ends"] for outcome in of_trunk.values() if "ends" in outcome), None)
            trunk = Trunk(steps, fitted(list(steps), list(steps.values())), starts[tuple(checkpoint)], ends)
            grouped.setdefault((*checkpoint[:4], goal), []).append(trunk)
    return [Setting(*key, trunks) for key, trunks in sorted(grouped.items())]


def _checkpoint(line: Line) -> tuple[Any, ...]:
    return tuple(line.config[name] for name in ("data", "model", "labels", "step", "seed"))


def over_trunks(values: Sequence[float]) -> Interval:
    """The geometric mean with its interval."""
    return mean([math.log(value) for value in values]).exp()
