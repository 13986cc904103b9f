"""What the seeds of a setting say together: which share of SGD's distance from the gradient flow a curve explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from ..comparisons import CONFIDENCE, Interval
from ..question import Finished, Line
from .curves import FRACTIONS, SPEEDS

# The interval of a share by 2,000 resamples is stable to about a percentage point.
RESAMPLES = 2000
GRADIENT_FLOW = "gradient flow"


@dataclass(frozen=True)
class Setting:
    """The runs of a problem, learning rate (times lambda_max of the Hessian at x0), batch size and sampling."""

    problem: str
    lr: float
    batch_size: int
    sampling: str
    lines: Sequence[Line]

    def squared(self, curve: str) -> np.ndarray:
        """Squared distances from SGD by seed; NaN where SGD diverged, or the flow left its bounds."""
        values = [line.outcome["squared_distances"][curve] for line in self.lines]
        return np.array([np.nan if value is None else value for value in values], dtype=float)

    def distance(self, curve: str) -> float:
        """The root of the mean over seeds; 0 where that is negative."""
        return float(np.sqrt(np.maximum(self.squared(curve).mean(), 0)))

    def mean_of(self, quantity: str) -> float:
        """The mean over seeds of another entry of the outcomes."""
        return float(np.mean([line.outcome[quantity] for line in self.lines]))

    @property
    def resolved(self) -> bool:
        """Whether SGD is farther from the gradient flow than the noise of the mean of its paths. False if it diverged.

        Only then is there something to explain.
        """
        # A single path has no noise, and the error of the integration is not to be explained either.
        noise = np.array([line.outcome["noise"] for line in self.lines], dtype=float)
        return bool(self.squared(GRADIENT_FLOW).mean() > noise.mean())

    def best(self, fractions: Sequence[float] = FRACTIONS, kind: str = "c") -> float:
        """The c of the smallest mean squared distance, chosen on the same runs; 0 is the gradient flow."""
        found = {0.0: self.squared(GRADIENT_FLOW).mean()}
        found |= {c: self.squared(f"{kind} {c:+g}").mean() for c in fractions}
        return min(found, key=lambda c: np.inf if np.isnan(found[c]) else found[c])

    def best_speed(self) -> float:
        """The speed of the gradient flow with the smallest mean squared distance, chosen on the same runs."""
        found = {1.0: self.squared(GRADIENT_FLOW).mean()} | {s: self.squared(f"speed {s:g}").mean() for s in SPEEDS}
        return min(found, key=lambda speed: found[speed])

    def share(self, curve: str) -> Interval:
        """1 - distance / distance of the gradient flow, with distances as above. Its interval is over the seeds."""
        squares = self.squared(curve), self.squared(GRADIENT_FLOW)
        share = float(explained(*squares))
        if len(self.lines) == 1 or curve == GRADIENT_FLOW:
            return Interval(share, share, share)
        interval = bootstrap(
            squares,
            explained,
            paired=True,
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        ).confidence_interval
        return Interval(share, float(interval.low), float(interval.high))

    def share_of_fraction(self, c: float, kind: str = "c") -> Interval:
        """As `share`, of the flow with eps = c / lambda_max(D); c = 0 is the gradient flow."""
        return self.share(f"{kind} {c:+g}" if c else GRADIENT_FLOW)

    def share_of_speed(self, speed: float) -> Interval:
        """As `share`, of the gradient flow at that speed."""
        return self.share(GRADIENT_FLOW if speed == 1 else f"speed {speed:g}")


def explained(squared: np.ndarray, of_gradient_flow: np.ndarray, axis: int = -1) -> np.ndarray:
    """The share, from squared distances by seed along an axis."""
    smallest = np.finfo(float).tiny  # a resample may have no distance left to explain
    ratio = np.maximum(squared.mean(axis), 0) / np.maximum(of_gradient_flow.mean(axis), smallest)
    return 1 - np.sqrt(ratio)


def settings(finished: Finished) -> list[Setting]:
    """In the order of the first line of each."""
    groups: dict[tuple[str, float, int, str], list[Line]] = {}
    for line in finished:
        config = line.config
        key = (config["problem"], config["lr"], config["batch_size"], config["sampling"])
        groups.setdefault(key, []).append(line)
    return [Setting(*key, lines) for key, lines in groups.items()]
