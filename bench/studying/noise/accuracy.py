"""How many batches it takes until the noise scale is known, by estimator: tables and numbers of the estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from ..data.defects import described
from ..question import Finished, Table, slug
from .cells import short, text
from .estimates import BATCH_SIZES, ESTIMATORS, PER_SAMPLE
from .predictions import over_trunks, simple

WANTED = 0.2  # of the truth: the standard error with which the noise scale counts as known


@dataclass(frozen=True)
class Point:
    """The seeds of one kind of trunk after the same number of steps."""

    data: str
    model: str
    labels: str
    step: int
    outcomes: Sequence[dict[str, Any]]

    @property
    def name(self) -> str:
        return slug(self.data, self.model, self.labels, self.step)

    def errors(self, size: int, estimator: str, quantity: str) -> list[Any]:
        """By seed."""
        return [outcome["errors"][str(size)][estimator][quantity] for outcome in self.outcomes]

    def error(self, size: int, estimator: str, quantity: str) -> float:
        return geometric_mean(self.errors(size, estimator, quantity))

    def batches(self, size: int, estimator: str = PER_SAMPLE) -> list[float]:
        """Until the noise scale has a standard error of `WANTED`, by seed."""
        return [(each / WANTED) ** 2 for each in self.errors(size, estimator, "noise_scale")]

    def scales(self) -> list[float]:
        """The simple noise scales, in samples, by seed."""
        return [simple(outcome) for outcome in self.outcomes]


def points(finished: Finished) -> list[Point]:
    """All with estimates, by name."""
    groups = sorted(finished.grouped("part", "data", "model", "labels", "step").items())
    return [Point(*key, [line.outcome for line in lines]) for (part, *key), lines in groups if part == "estimates"]


def by_estimator(found: Sequence[Point]) -> Table:
    """A row for each batch size and estimator, with means over all points."""
    rows = []
    for size in BATCH_SIZES if found else ():
        for estimator in ESTIMATORS:
            errors = [
                geometric_mean(each.error(size, estimator, quantity) for each in found)
                for quantity in ("trace", "squared_norm")
            ]
            shares = ratios(found, size, estimator)
            cells = [geometric_mean(shares), min(shares), max(shares)]
            rows.append([str(size), estimator, *(f"{100 * each:.0f}" for each in errors), *map(short, cells)])
    titles = ("error of tr Sigma, %", "error of the squared norm, %", "batches / per sample's", "least", "largest")
    return Table(("B", "gradients known", *titles), rows)


def ratios(found: Sequence[Point], size: int, estimator: str) -> list[float]:
    """At each point, how many batches it takes in units of those that per-sample gradients take."""
    return [geometric_mean(point.batches(size, estimator)) / geometric_mean(point.batches(size)) for point in found]


def by_point(found: Sequence[Point]) -> Table:
    """A row for each point: the noise scale, and after how many batches it is known from per-sample gradients."""
    rows = [
        [
            f"{point.data}, {point.model}",
            described(point.labels),
            str(point.step),
            f"{geometric_mean(outcome['loss'] for outcome in point.outcomes):.2g}",
            *(text(over_trunks(each)) for each in (point.scales(), *map(point.batches, BATCH_SIZES))),
        ]
        for point in found
    ]
    return Table(
        ("model", "labels", "step", "loss", "noise scale", *(f"batches of {size}" for size in BATCH_SIZES)), rows
    )


def numbers(found: Sequence[Point]) -> dict[str, str]:
    """Of points, such as digits.mlp.clean.200.64.batches, and of estimators, such as 64.one_half.ratio."""
    texts = {}
    for point in found:
        texts[f"{point.name}.scale"] = short(geometric_mean(point.scales()))
        for size in BATCH_SIZES:
            texts[f"{point.name}.{size}.batches"] = short(geometric_mean(point.batches(size)))
    for size in BATCH_SIZES if found else ():
        needed = [geometric_mean(point.batches(size)) for point in found]
        texts |= {f"{size}.batches.least": short(min(needed)), f"{size}.batches.largest": short(max(needed))}
        for estimator in ESTIMATORS:
            shares, name = ratios(found, size, estimator), f"{size}.{slug(estimator)}"
            of_trace = [
                (point.error(size, estimator, "trace") / point.error(size, PER_SAMPLE, "trace")) ** 2 for point in found
            ]
            texts |= {
                f"{name}.ratio": short(geometric_mean(shares)),
                f"{name}.least": short(min(shares)),
                f"{name}.largest": short(max(shares)),
                f"{name}.trace": short(geometric_mean(of_trace)),
            }
    return texts
