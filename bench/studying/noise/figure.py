"""The figure of question 6."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

import numpy as np

from rgd_ext.commands.colours import BLUE, GREEN, GREY, ORANGE

from ..plotting import COLOURS, logarithmic
from .accuracy import WANTED, Point
from .critical import USUAL_GOAL
from .estimates import AVERAGED, PER_SAMPLE
from .hyperbola import Hyperbola
from .predictions import Setting

POINT = ("digits", "MLP", "clean", 200)  # whose errors are shown
SIZE = 64  # of its batches
ESTIMATORS = {PER_SAMPLE: BLUE, "all 8 parts": GREEN, "both halves": ORANGE, "one half": GREY}
MARKERS = {"simple": "o", "Hessian": "s", "running": "^", "Hessian, end": "*"}
STYLES = ("-", "--", ":")


def draw(figure: Any, points: Sequence[Point], settings: Sequence[Setting]) -> None:
    """Errors of the noise scale, steps by batch size, and predicted critical batch sizes against the measured ones."""
    left, middle, right = figure.subplots(1, 3)
    usual = [setting for setting in settings if setting.goal == USUAL_GOAL]
    models = dict.fromkeys((setting.data, setting.model) for setting in usual)
    colours = dict(zip(models, COLOURS, strict=False))
    if points:
        named = {(each.data, each.model, each.labels, each.step): each for each in points}
        draw_errors(left, named.get(POINT, points[0]))
    if usual:
        draw_steps(middle, usual, colours)
        draw_predictions(right, usual, colours)
        figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    for axes in (left, middle, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        logarithmic(axes.xaxis)
        logarithmic(axes.yaxis)
        axes.grid(alpha=0.3)


def draw_errors(axes: Any, point: Point) -> None:
    """Of the noise scale, against how many samples it is estimated from."""
    for estimator, colour in ESTIMATORS.items():
        quantiles = np.array(point.errors(SIZE, estimator, "quantiles"))
        samples = SIZE * np.array(AVERAGED[: quantiles.shape[1]])
        axes.plot(samples, 100 * np.exp(np.log(quantiles).mean(0)), color=colour, marker=".", label=estimator)
    axes.axhline(100 * WANTED, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_title(f"{point.data}, {point.model}, step {point.step}, B = {SIZE}", fontsize="medium")
    axes.set_xlabel("samples per estimate")
    axes.set_ylabel("error of the noise scale, %")
    axes.legend(fontsize="small", title="gradients known", title_fontsize="small")


def draw_steps(axes: Any, settings: Sequence[Setting], colours: dict[tuple[str, str], str]) -> None:
    """Until the goal, with the fitted curves, on each of which a bar marks the critical batch size."""
    seen: Counter[tuple[str, str]] = Counter()
    for setting in settings:
        model = (setting.data, setting.model)
        style, colour = STYLES[seen[model]], colours[model]
        seen[model] += 1
        of_trunks = [set(trunk.steps) for trunk in setting.trunks]
        every, sizes = set.union(*of_trunks), sorted(set.intersection(*of_trunks))
        steps = [geometric_mean(trunk.steps[size] for trunk in setting.trunks) for size in sizes]
        fit = Hyperbola(setting.fewest().mean, setting.critical().mean, misfit=0)
        fine = np.geomspace(min(every), max(every))
        label = f"{', '.join(model)}, step {setting.step}"
        axes.plot(fine, fit.steps(fine), color=colour, linestyle=style, label=label)
        axes.plot(sizes, steps, color=colour, linestyle="", marker=".")
        axes.plot(fit.critical, fit.steps(fit.critical), color=colour, marker="|", markersize=14, markeredgewidth=2)
    axes.set_title(f"until {USUAL_GOAL:g} times the loss", fontsize="medium")
    axes.set_xlabel("batch size B, samples")
    axes.set_ylabel("steps at the best rate")


def draw_predictions(axes: Any, settings: Sequence[Setting], colours: dict[tuple[str, str], str]) -> None:
    """Against the measured critical batch sizes, with lines where they agree and where they differ by two."""
    for setting in settings:
        measured, colour = setting.critical().mean, colours[setting.data, setting.model]
        for predictor, marker in MARKERS.items():
            if ratios := setting.ratios(predictor):
                predicted = measured * geometric_mean(ratios)
                axes.plot(measured, predicted, color=colour, marker=marker, markerfacecolor="none", linestyle="")
    ends = np.array(axes.get_xlim())
    for factor, style in ((1, "-"), (2, ":"), (0.5, ":")):
        axes.plot(ends, factor * ends, color=GREY, linewidth=0.8, linestyle=style)
    for predictor, marker in MARKERS.items():
        axes.plot([], [], color=GREY, marker=marker, markerfacecolor="none", linestyle="", label=predictor)
    axes.set_title("noise scales", fontsize="medium")
    axes.set_xlabel("critical batch size, samples")
    axes.set_ylabel("noise scale, samples")
    axes.legend(fontsize="small")
