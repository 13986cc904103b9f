"""Time of a step against what grows, in ms and in steps of SGD; a column of panels for each series."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scaling import Series

STYLES = {"SGD": ("#444444", "o"), "RGD": ("#0072b2", "s")}


def draw(rows: list[Series], path: str) -> None:
    """Write a PNG; says so instead where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(4 * len(rows), 6.4), layout="constrained")
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
