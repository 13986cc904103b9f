"""The figure of the `noise` command."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from ..colours import BLUE, GREY, ORANGE
from .measurement import Noise, Row

# With more parameters than this, the bars are of the layers.
MOST_BARS = 80
ROW_HEIGHT = 0.22  # inches


def draw(noise: Noise, path: Path) -> None:
    """Write the figure to `path` as PNG: bars of the noise scale and of the share of the noise, one above the other."""
    rows = _shown(noise.rows)
    whole = noise.rows[0]
    figure = Figure(figsize=(10, 1.4 + ROW_HEIGHT * len(rows)), layout="constrained")
    scales, shares = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    places = range(len(rows))
    found = [row.noise_scale or math.nan for row in rows]
    scales.barh(places, found, color=BLUE)
    scales.set_yticks(places, [row.name for row in rows], fontsize="small")
    scales.set_ylim(len(rows) - 0.5, -0.5)
    scales.set_xscale("log")
    # The bars begin at one sample, since a logarithmic axis has no zero.
    scales.set_xlim(left=min([1, *(value / 2 for value in found if value > 0)]))
    scales.set_xlabel("gradient noise scale, samples")
    if whole.noise_scale:
        scales.axvline(whole.noise_scale, color=ORANGE, label=f"model: {whole.noise_scale:.4g}")
    size = max(noise.batch_sizes)
    scales.axvline(size, color=GREY, linestyle="--", label=f"batch size: {size}")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    shares.barh(places, [100 * noise.share(row) for row in rows], color=BLUE)
    shares.set_xlabel("share of the noise, tr Σ, %")
    for axes in (scales, shares):
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def _shown(rows: list[Row]) -> list[Row]:
    """The parameters, or the modules that have parameters of their own if there are too many."""
    parameters = [row for row in rows if not row.is_module]
    if len(parameters) <= MOST_BARS:
        return parameters
    layers = {row.name.rpartition(".")[0] for row in parameters}
    return [row for row in rows if row.is_module and row.name in layers]
