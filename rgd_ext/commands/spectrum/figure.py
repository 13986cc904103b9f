"""The figure of the `spectrum` command."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..colours import BLUE, ORANGE
from .computation import SpectrumSummary


def draw(spectrum: SpectrumSummary, path: Path) -> None:
    """Write the figure to `path` as PNG: eigenvalues on a log scale, and their cumulative share of the trace."""
    indices = range(1, len(spectrum.eigenvalues) + 1)
    marker = "." if len(indices) < 200 else ""
    figure = Figure(figsize=(9, 7), layout="constrained")
    values, shares = figure.subplots(2, sharex=True, height_ratios=(1.6, 1))
    values.semilogy(indices, spectrum.eigenvalues, color=BLUE, marker=marker)
    values.set_ylabel("eigenvalue of D, |gradient|²")
    values.set_title(f"d = {spectrum.dimension:,}, N = {spectrum.samples:,}, tr D = {spectrum.trace:.4g} |gradient|²")
    shares.plot(indices, 100 * spectrum.shares, color=ORANGE, marker=marker)
    shares.set_ylabel("cumulative share\nof the trace, %")
    shares.set_ylim(0, 105)
    shares.set_xlabel("index of the eigenvalue, from the largest")
    shares.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (values, shares):
        axes.grid(alpha=0.3)
    figure.align_ylabels()
    figure.savefig(path, format="png", dpi=120)
