"""The figure of the `noise` command."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from ..colours import BLUE, GREY, ORANGE
from .measurement import Noise, Row

# With more parameters than this, the bars are of the layers.
MOST_PARAMETERS = 80
ROW_HEIGHT, HIGHEST = 0.22, 100  # inches


def draw(noise: Noise, path: Path) -> None:
    """Write the figure to `path` as PNG: bars of the noise scale, and beside them of the share of the noise."""
    rows, whole, batch_size = _shown(noise.rows), noise.rows[0].noise_scale, max(noise.batch_sizes)
    places, scales = range(len(rows)), [row.noise_scale or math.nan for row in rows]
    figure = Figure(figsize=(10, min(1.4 + ROW_HEIGHT * len(rows), HIGHEST)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    left.barh(places, scales, color=BLUE)
    left.set_yticks(places, [row.name for row in rows], fontsize="small", parse_math=False)
    left.set_ylim(len(rows) - 0.5, -0.5)
    for place, row in enumerate(rows):
        if row.noise_scale is None:
            text = " noise hides the gradient"
            left.text(0, place, text, transform=left.get_yaxis_transform(), va="center", fontsize="small", color=GREY)
    left.axvline(batch_size, color=GREY, linestyle="--", label=f"batch size: {batch_size}")
    if whole:
        left.axvline(whole, color=ORANGE, label=f"noise scale of the model: {whole:.4g}")
    # The bars begin at one sample or less, since a logarithmic axis has no zero.
    seen = [value for value in (*scales, whole or math.nan, batch_size) if value > 0]
    left.set_xscale("log")
    left.set_xlim(min([1, *(value / 2 for value in seen)]), 1.5 * max(seen))
    left.set_xlabel("gradient noise scale, samples")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    right.barh(places, [100 * noise.share(row) for row in rows], color=BLUE)
    right.set_xlabel("share of the noise, tr Σ, %")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def _shown(rows: list[Row]) -> list[Row]:
    """The parameters, or if there are too many, the sums over those of each module that are not in its children."""
    parameters = [row for row in rows if not row.is_module]
    if len(parameters) <= MOST_PARAMETERS:
        return parameters
    layers: dict[str, list[Row]] = {}
    for row in parameters:
        layers.setdefault(row.name.rpartition(".")[0] or "(model)", []).append(row)
    return [_sum(name, own) for name, own in layers.items()]


def _sum(name: str, rows: list[Row]) -> Row:
    elements, trace, squared_grad_norm = (sum(column) for column in zip(*(row[2:] for row in rows), strict=True))
    return Row(name, True, elements, trace, squared_grad_norm)
