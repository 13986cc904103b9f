"""The figure of a training that `Monitor` recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator

Run = dict[str, np.ndarray]
# More points than this across a panel would cover each other.
POINTS = 500
PANEL_HEIGHT = 2.8  # inches
NOISE_CAPTION = (
    "The noise scale estimates the critical batch size: doubling a B far below it nearly halves the steps to a loss,\n"
    "and doubling one far above it saves hardly any."
)


def draw(run: Run, path: Path) -> None:
    """Write the figure to `path` as PNG: panels over the steps, of medians of consecutive steps in a long run.

    Args:
        run: from `monitor.read`.
        path: of the PNG.
    """
    size = -(-len(run["step"]) // POINTS)
    run = {name: _medians(values, size) for name, values in (run | _derived(run)).items()}
    fills = _panels(run)
    figure = Figure(figsize=(9, PANEL_HEIGHT * len(fills)), layout="constrained")
    panels = figure.subplots(len(fills), sharex=True)
    for axes, fill in zip(panels, fills, strict=True):
        fill(axes, run)
        axes.grid(alpha=0.3)
        if not axes.has_data():
            axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    panels[-1].set_xlabel("step" if size == 1 else f"step (medians of {size})")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    figure.align_ylabels(panels)
    figure.savefig(path, format="png", dpi=120)


def _panels(run: Run) -> list[Callable[[Axes, Run], None]]:
    """The functions that fill the panels: fewer where the weights do not come from epsilon, or are all 1."""
    if np.isfinite(run["epsilon"]).any():
        return [_loss, _epsilon, _curvature, _agreement, _weights, _noise]
    if np.array_equal(run["weight_min"], run["weight_max"]):  # only observed
        return [_loss, _curvature, _noise]
    return [_loss, _curvature, _agreement, _weights, _noise]


def _derived(run: Run) -> Run:
    """What the panels show besides columns, for every step.

    The medians are taken afterwards: computed from medians, these values might violate bounds that hold in every step.
    """
    with np.errstate(divide="ignore"):
        bound = 1 / run["lambda_max"]
    share = run["effective_sample_size"] / run["batch_size"]
    return {"|epsilon|": np.abs(run["epsilon"]), "bound": bound, "effective_share": share}


def _medians(values: np.ndarray, size: int) -> np.ndarray:
    """The median of every `size` consecutive values; NaN where one of them is NaN."""
    return np.array([np.median(values[begin : begin + size]) for begin in range(0, len(values), size)])


def _loss(axes: Axes, run: Run) -> None:
    _line(axes, run, run["loss"], None, "C0")
    axes.set_ylabel("loss")


def _epsilon(axes: Axes, run: Run) -> None:
    label = r"$|\epsilon|$" if (run["epsilon"] < 0).any() else r"$\epsilon$"
    _line(axes, run, _positive(run["|epsilon|"]), label, "C0")
    _line(axes, run, _positive(run["bound"]), r"$1 / \lambda_{\max}(D)$", "C1")
    _log(axes, "1 / |gradient|²")


def _curvature(axes: Axes, run: Run) -> None:
    _line(axes, run, _positive(run["trace"]), r"$\mathrm{tr}\,D$", "C2")
    _line(axes, run, _positive(run["lambda_max"]), r"$\lambda_{\max}(D)$", "C1")
    _line(axes, run, _positive(run["rayleigh"]), r"$g^T D g \,/\, |g|^2$", "C0")
    _log(axes, "|gradient|²")


def _agreement(axes: Axes, run: Run) -> None:
    _line(axes, run, run["cosine"], "cosine of direction\nand gradient", "C0")
    _line(axes, run, run["effective_share"], "effective sample\nsize / B", "C1")
    axes.set_ylabel("fraction")


def _weights(axes: Axes, run: Run) -> None:
    for low, high, opacity, label in (
        ("weight_min", "weight_max", 0.2, "smallest to largest"),
        ("weight_25", "weight_75", 0.5, "quartiles"),
    ):
        axes.fill_between(run["step"], run[low], run[high], color="C0", alpha=opacity, linewidth=0.5, label=label)
    _line(axes, run, run["weight_median"], "median", "C0")
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="SGD")
    axes.set_ylabel(r"weight of a sample, $B\,w_i$")


def _noise(axes: Axes, run: Run) -> None:
    _line(axes, run, _positive(run["noise_scale"]), r"noise scale, $\mathrm{tr}\,\Sigma \,/\, |\mu|^2$", "C3")
    axes.plot(run["step"], run["batch_size"], color="black", linewidth=0.8, linestyle="--", label="batch size B")
    axes.set_title(NOISE_CAPTION, loc="left", fontsize="medium")
    _log(axes, "samples")


def _line(axes: Axes, run: Run, values: np.ndarray, label: str | None, colour: str) -> None:
    if np.isfinite(values).any():
        axes.plot(run["step"], values, color=colour, label=label, linewidth=1, marker="." if len(values) < 50 else "")


def _positive(values: np.ndarray) -> np.ndarray:
    """The values that a logarithmic scale can show; NaN in place of others, as where D = 0."""
    return np.where(values > 0, values, np.nan)


def _log(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    # Where few powers of ten are on the axis, ticks between them are labelled, too.
    axes.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 0.5)))
    axes.set_ylabel(label)
