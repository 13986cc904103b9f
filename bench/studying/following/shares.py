"""What the seeds of a setting say together: which share of SGD's distance from the gradient flow a curve explains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from ..inference import CONFIDENCE, Interval
from ..question import Finished, Line
from .curves import SPEEDS

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

    def best(self, curves: Mapping[str, float]) -> tuple[float | None, Interval]:
        """What stands for the curve nearest to SGD, None for the gradient flow, and the share that the choice explains.

        For each seed the curve is chosen by the mean squared distances of the others, so that the share is not that of
        a choice on the same runs.

        Args:
            curves: by name, what stands for them, such as c.
        """
        names = [GRADIENT_FLOW, *curves]
        squares = np.nan_to_num(np.stack([self.squared(name) for name in names]), nan=np.inf)
        nearest = names[squares.mean(1).argmin()]
        seeds = np.arange(len(self.lines))
        others = np.stack([np.delete(squares, seed, 1).mean(1) for seed in seeds]) if len(seeds) > 1 else squares.T
        return curves.get(nearest), self._share(squares[others.argmin(1), seeds])

    def share(self, curve: str) -> Interval:
        """1 - distance / distance of the gradient flow, with distances as above. Its interval is over the seeds."""
        return self._share(self.squared(curve))

    def _share(self, squared: np.ndarray) -> Interval:
        of_gradient_flow = self.squared(GRADIENT_FLOW)
        share = float(explained(squared, of_gradient_flow))
        if len(self.lines) == 1 or (squared == of_gradient_flow).all() or not np.isfinite(squared).all():
            return Interval(share, share, share)
        interval = bootstrap(
            (squared, of_gradient_flow),
            explained,
            paired=True,
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        ).confidence_interval
        return Interval(share, float(interval.low), float(interval.high))


def fractions(among: Iterable[float], kind: str = "c") -> dict[str, float]:
    """The flows with eps = c / lambda_max(D) for these c, or of the `kind` "constant c"."""
    return {f"{kind} {c:+g}": c for c in among}


def speeds() -> dict[str, float]:
    """The gradient flows at other speeds."""
    return {f"speed {speed:g}": speed for speed in SPEEDS}


def explained(squared: np.ndarray, of_gradient_flow: np.ndarray, axis: int = -1) -> np.ndarray:
    """The share, from squared distances by seed along an axis."""
    smallest = np.finfo(float).tiny  # a resample may have no distance left to explain
    ratio = np.maximum(squared.mean(axis), 0) / np.maximum(of_gradient_flow.mean(axis), smallest)
    return 1 - np.sqrt(ratio)


def settings(finished: Finished) -> list[Setting]:
    """In the order of the first line of each."""
    groups = finished.grouped("problem", "lr", "batch_size", "sampling")
    return [Setting(*key, lines) for key, lines in groups.items()]
