"""The figure of the page: how much flows explain, against c."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..plotting import COLOURS
from .curves import BATCH_SIZES, FRACTIONS, MAGNITUDES
from .paths import SHUFFLED, WITH_REPLACEMENT
from .shares import GRADIENT_FLOW, Setting, fractions

STYLES = {(WITH_REPLACEMENT, BATCH_SIZES[1]): "-", (SHUFFLED, BATCH_SIZES[-1]): "--"}
COLUMNS = 3
LOWEST = -100  # percent; flows farther from SGD than that are not shown
# Where and how the shares of flows without a c are marked, at the right of a panel.
MARKS = {"modified, gradient descent": (1.35, "s"), "modified, shuffled SGD": (2.1, "D")}
TICKS = (-0.9, -0.2, -0.05, 0, 0.05, 0.2, 0.9)


def draw(figure: Any, settings: Sequence[Setting]) -> None:
    """A panel for each problem, with a curve for each rate at a small batch and at the whole batch."""
    problems = list(dict.fromkeys(each.problem for each in settings))
    colours = dict(zip(sorted({each.lr for each in settings}), COLOURS, strict=False))
    panels = figure.subplots(-(-len(problems) // COLUMNS), COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes, problem in zip(panels.flat, problems, strict=False):
        prepare(axes, problem)
        for each in settings:
            if each.problem == problem and (each.sampling, each.batch_size) in STYLES and each.resolved:
                curve(axes, each, colours[each.lr], STYLES[each.sampling, each.batch_size])
    for axes in panels.flat[len(problems) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("share explained, %")
    for axes in panels.flat[max(len(problems) - COLUMNS, 0) : len(problems)]:
        axes.set_xlabel(r"$c = \epsilon\,\lambda_{\max}(D(x))$")
        axes.tick_params(labelbottom=True)
    legend(figure, colours)


def prepare(axes: Any, problem: str) -> None:
    axes.set_title(problem, fontsize="medium", fontweight="bold")
    axes.set_xscale("symlog", linthresh=MAGNITUDES[0], linscale=0.4)
    axes.set_xlim(-1.1, 2.7)  # with a margin for the marks
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS], fontsize="small")
    axes.xaxis.set_minor_locator(axes.xaxis.get_major_locator())
    axes.set_ylim(LOWEST, 105)
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.axvspan(1.08, 2.7, color="#555555", alpha=0.08, linewidth=0)
    axes.grid(alpha=0.3)


def curve(axes: Any, setting: Setting, colour: str, style: str) -> None:
    """The shares of all c, with the gradient flow in the middle, and at the right those of the modified flows."""
    named = fractions(FRACTIONS) | {GRADIENT_FLOW: 0.0}
    points = sorted((c, 100 * setting.share(name).mean) for name, c in named.items())
    axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=".", markersize=4, linewidth=1.4)
    for name, (place, marker) in MARKS.items():
        share, face = 100 * setting.share(name).mean, colour if style == "-" else "none"
        axes.plot(place, share, color=colour, marker=marker, markerfacecolor=face, markersize=5, linestyle="")


def legend(figure: Any, colours: dict[float, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=f"rate {lr:g}") for lr, colour in colours.items()]
    handles += [
        Line2D([], [], color="black", linestyle="-", label=f"B = {BATCH_SIZES[1]}, with replacement (filled)"),
        Line2D([], [], color="black", linestyle="--", label="B = N, gradient descent (hollow)"),
        Line2D([], [], linestyle=""),
    ]
    handles += [
        Line2D([], [], color="black", marker=marker, markersize=5, linestyle="", label=f"modified flow, {label}")
        for (_, marker), label in zip(MARKS.values(), ("gradient descent", "shuffled SGD"), strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
