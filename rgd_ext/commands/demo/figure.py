"""The figure of the demo: loss and accuracy, and the epsilon, eigenvalue and weights of each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from ..colours import BLUE, GREY, YELLOW
from . import optimizers
from .training import History

COLOURS = dict(zip(optimizers.NAMES, (GREY, BLUE, YELLOW, "#C2185B"), strict=True))
DASHED = (0, (3, 1.5))
ROWS = (
    "training loss, nats",
    "test accuracy, %",
    r"$\epsilon$, 1 / |gradient|²",
    r"$\lambda_{\max}(D)$, |gradient|²",
    r"weight of a sample, $B\,w_i$",
)


def draw(results: dict[tuple[str, str], list[dict[str, History]]], terms: str, path: Path) -> None:
    """Write the figure to `path` as PNG: a column for each pair (labels, model), with a panel for each of `ROWS`.

    Args:
        results: as in `table.summary`.
        terms: the settings of the trainings, for the title.
        path: of the PNG.
    """
    figure = Figure(figsize=(4.2 * len(results), 15), layout="constrained")
    panels = figure.subplots(len(ROWS), len(results), sharex=True, squeeze=False)
    for column, ((setting, model), trials) in zip(panels.T, results.items(), strict=True):
        first = trials[0]
        missing = [name for name in first if first[name].epsilons and not first[name].largest_eigenvalues]
        _label(column, f"{model}, {setting}", any(map(any, first["SGD"].mislabelled)), missing)
        for name in optimizers.NAMES:
            _draw_optimizer(column, [trial[name] for trial in trials], COLOURS[name])
        _zoom(column[1])
    for axes, label in zip(panels[:, 0], ROWS, strict=True):
        axes.set_ylabel(label)
    figure.align_ylabels(panels[:, 0])
    _legends(figure, f"RGD and SGD on digits: {terms}")
    figure.savefig(path, format="png", dpi=120)


def _label(column: list[Axes], title: str, noisy: bool, missing: list[str]) -> None:
    column[0].set_title(title, fontweight="bold")
    if missing:
        column[3].set_title(f"not computed by {', '.join(missing)}", fontsize="medium")
    column[4].set_title("mean of the samples with either label" if noisy else "median, 5 % to 95 %", fontsize="medium")
    column[4].axhline(1, color=COLOURS["SGD"])
    column[4].set_xlabel("step")
    for axes in column:
        axes.grid(alpha=0.3)
    for axes in (*([] if noisy else column[:1]), column[2], column[3]):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_optimizer(column: list[Axes], histories: list[History], colour: str) -> None:
    def by_epoch(name: str) -> Tensor:
        """The values of all steps and seeds in a row for each epoch; of losses, the means over its steps by seed."""
        values = torch.stack([torch.as_tensor(getattr(history, name)) for history in histories], 1)
        return values.reshape(epochs, -1) if name != "losses" else values.unflatten(0, (epochs, steps)).mean(1)

    epochs = len(histories[0].test_accuracies)
    steps = len(histories[0].losses) // epochs
    ends = [steps * (epoch + 1) for epoch in range(epochs)]
    middles = [end - steps / 2 for end in ends]
    _band(column[0], middles, by_epoch("losses"), colour, (0, 1))
    _band(column[1], ends, 100 * by_epoch("test_accuracies"), colour, (0, 1))
    if not histories[0].epsilons:
        return
    _band(column[2], middles, by_epoch("epsilons"), colour, (0.25, 0.5, 0.75))
    if histories[0].largest_eigenvalues:
        _band(column[3], middles, by_epoch("largest_eigenvalues"), colour, (0.25, 0.5, 0.75))
    weights, mislabelled = by_epoch("weights"), by_epoch("mislabelled")
    if mislabelled.any():
        for chosen, style in ((mislabelled, DASHED), (~mislabelled, "-")):
            column[4].plot(middles, (weights * chosen).sum(1) / chosen.sum(1), color=colour, linestyle=style)
    else:
        _band(column[4], middles, weights, colour, (0.05, 0.5, 0.95))


def _band(axes: Axes, steps: Sequence[float], values: Tensor, colour: str, quantiles: tuple[float, ...]) -> None:
    """Draw the band between the outer quantiles of each row, and its middle quantile, or its mean if there is none."""
    low, *middle, high = values.double().quantile(torch.tensor(quantiles, dtype=torch.double), 1)
    axes.fill_between(steps, low, high, facecolor=(colour, 0.12), edgecolor=(colour, 0.3), linewidth=0.6)
    axes.plot(steps, middle[0] if middle else values.mean(1), color=colour)


def _zoom(axes: Axes) -> None:
    """Limit the range of the accuracies to those after the first third, in which all of them rise from far below."""
    curves = [np.asarray(line.get_ydata()) for line in axes.lines]
    axes.set_ylim(min(curve[len(curve) // 3 :].min() for curve in curves) - 2, min(100, axes.dataLim.ymax + 0.5))


def _legends(figure: Figure, title: str) -> None:
    lines = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in COLOURS.items()]
    top = {"title": title, "title_fontsize": "x-large", "fontsize": "large"}
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False, **top)
    styles = [
        Patch(alpha=0.3, color="gray", label="loss, accuracy: smallest to largest of the seeds"),
        Patch(alpha=0.3, color="gray", label=r"$\epsilon$, $\lambda_{\max}$: quartiles of an epoch's steps"),
        Line2D([], [], color="gray", label="weight of correctly labelled samples"),
        Line2D([], [], color="gray", linestyle=DASHED, label="weight of mislabelled samples"),
    ]
    figure.legend(handles=styles, loc="outside lower center", ncols=len(styles), frameon=False, fontsize="large")
