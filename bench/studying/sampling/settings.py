"""The runs of the comparison of batches with the data set, by what is averaged over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from statistics import fmean

from ..contests.ratios import ratio_to_baseline
from ..data.defects import described
from ..question import Finished, Line
from .comparison import OWNERS, POINTS, SGD, sizes
from .decreases import Decreases

SIMILARITIES = {
    "eigenvalue": "lambda_max(D_B) / lambda_max(D)",
    "cosine gradient": "cos(g_B, mu)",
    "cosine mean": "cos(D_B mu, D mu)",
    "cosine data": "cos(D g_B, D mu)",
    "cosine batch": "cos(D_B g_B, D mu)",
    "length data": "length of eps D g_B / g_B's",
    "length batch": "length of eps D_B g_B / g_B's",
}
OTHER_SIMILARITIES = ("trace", "effective_rank")  # not in the table
ALL = "all"


@dataclass(frozen=True, eq=False)
class Setting:
    """The seeds of a training, at one of its points, with batches of one size."""

    data: str
    labels: str
    samples: int
    step: int
    size: int
    lines: Sequence[Line]

    @property
    def training(self) -> tuple[str, str]:
        """Data and labels in words."""
        return self.data, described(self.labels)

    @property
    def size_name(self) -> str:
        """The size, or `ALL`."""
        return ALL if self.size == self.samples else str(self.size)

    def values(self, quantity: str) -> list[float]:
        """By seed."""
        point, column = POINTS.index(self.step), sizes(self.samples).index(self.size)
        return [line.outcome[quantity][point][column] for line in self.lines]

    @cached_property
    def decreases(self) -> Decreases:
        """Of the loss by a single step."""
        seeds = [line.config["seed"] for line in self.lines]
        values = {name: self.values(f"decrease {name}") for name in (SGD, *OWNERS)}
        return Decreases({name: dict(zip(seeds, map(log, each), strict=True)) for name, each in values.items()})

    @cached_property
    def means(self) -> dict[str, float]:
        """By quantity; of gains the geometric means."""
        return {
            **{quantity: fmean(self.values(quantity)) for quantity in (*SIMILARITIES, *OTHER_SIMILARITIES)},
            **{f"gain {owner}": ratio_to_baseline(each).mean for owner, each in self.decreases.gains.items()},
            **{
                f"{owner} over batch": ratio_to_baseline(each).mean for owner, each in self.decreases.over_batch.items()
            },
        }


def settings(finished: Finished) -> list[Setting]:
    """All that were run, by training, step and size."""
    trainings = sorted(finished.grouped("data", "labels", "samples", "steps").items())
    return [
        Setting(data, labels, samples, step, size, lines)
        for (data, labels, samples, steps), lines in trainings
        for step in POINTS
        if step <= steps
        for size in sizes(samples)
    ]
