"""What the figures of the study have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rgd_ext.commands.colours import BLUE, GREEN, ORANGE

from .inference import Interval

COLOURS = (BLUE, ORANGE, GREEN)


def band(axes: Any, x: Sequence[float], values: np.ndarray, colour: str, label: str, style: str = "-") -> None:
    """The mean over seeds of curves (seeds, points), and the band from the smallest to the largest."""
    axes.fill_between(x, values.min(0), values.max(0), facecolor=colour, alpha=0.15, linewidth=0)
    axes.plot(x, values.mean(0), color=colour, linestyle=style, label=label)
    axes.grid(alpha=0.3)


def panels_of_methods(figure: Any, rows: int, columns: int, methods: Sequence[str], sharex: str) -> np.ndarray:
    """Panels (rows, columns), at least one, with a place for each method from the top to the bottom."""
    panels = figure.subplots(max(rows, 1), max(columns, 1), sharex=sharex, sharey=True, squeeze=False)
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    return panels


def dots(axes: Any, intervals: Sequence[Interval], places: Sequence[float], colour: str, label: str) -> None:
    """A dot for each interval, with its ends, at a height of `places`."""
    middles = [each.mean for each in intervals]
    ends = [[each.mean - each.low for each in intervals], [each.high - each.mean for each in intervals]]
    axes.errorbar(middles, places, xerr=ends, color=colour, marker="o", markersize=4, linestyle="none", label=label)
    axes.grid(alpha=0.3)


def logarithmic(axis: Any) -> None:
    """Label a logarithmic axis, after all is drawn, at powers of ten, and at 2 and 5 times these if it has few."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
