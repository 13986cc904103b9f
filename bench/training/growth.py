"""How the cost of a step grows with the batch or with the depth of a network: the samples, their fit, and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from ..measuring.plots import new_figure, save
from ..measuring.timing import Samples
from .models import Example

STYLES = {"SGD": ("#444444", "o"), "RGD": ("#0072b2", "s")}


@dataclass
class Series:
    """Steps on networks of one kind and of several sizes. `grows` names what the sizes are."""

    name: str
    grows: str
    build: Callable[[int], Example]
    sizes: tuple[int, ...]
    milliseconds: dict[int, Samples] = field(default_factory=dict)

    def medians(self, arm: str) -> list[float]:
        """Milliseconds of a step, for each size."""
        return [statistics.median(samples[arm]) for samples in self.milliseconds.values()]

    def exponent(self, arm: str) -> float:
        """p of a cost that grows as size^p, fitted to the three largest sizes."""
        logs = ([math.log(value) for value in values[-3:]] for values in (self.sizes, self.medians(arm)))
        return statistics.linear_regression(*logs).slope


def draw(rows: list[Series], path: str) -> None:
    """Write a PNG: a column of panels for each series, with the time of a step and its ratio to that of SGD."""
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    figure = new_figure(4 * len(rows), 6.4)
    panels = figure.subplots(2, len(rows), sharex="col", squeeze=False, height_ratios=(2, 1))
    for (times, ratios), row in zip(panels.T, rows, strict=True):
        for arm, (colour, marker) in STYLES.items():
            label = f"{arm} (grows as {row.grows}$^{{{row.exponent(arm):.2f}}}$)"
            times.plot(row.sizes, row.medians(arm), marker=marker, color=colour, label=label)
        last = row.medians("RGD")[-1]
        linear = [last * size / row.sizes[-1] for size in row.sizes]
        times.plot(row.sizes, linear, color="black", linestyle=":", linewidth=1, label="linear")
        times.set(title=row.name, xscale="log", yscale="log")
        times.legend(frameon=False)
        pairs = zip(row.medians("RGD"), row.medians("SGD"), strict=True)
        ratios.plot(row.sizes, [rgd / sgd for rgd, sgd in pairs], marker="s", color=STYLES["RGD"][0])
        ratios.axhline(1, color=STYLES["SGD"][0])
        ratios.set(xlabel=row.grows, xticks=row.sizes)
        ratios.xaxis.set_major_formatter(ScalarFormatter())
        ratios.xaxis.set_minor_locator(NullLocator())
        ratios.xaxis.set_minor_formatter(NullFormatter())
        for panel in (times, ratios):
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("step (ms)")
    panels[1, 0].set_ylabel("RGD / SGD")
    save(figure, path)
