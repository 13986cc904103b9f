"""The errors of methods on a problem, and how they are printed and drawn."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from textwrap import shorten

from ..measuring.plots import new_figure, save
from ..measuring.report import Section
from .methods import OURS

HEADER = (
    "problem",
    "method",
    "setting",
    "steps",
    "ms a step",
    "error",
    "least to largest",
    "solution error",
    "best other / this",
)
REASON_WIDTH = 80  # in the table; the JSON has the whole text
COLUMNS = 3  # of panels


@dataclass
class Curve:
    """A run: the steps and seconds after each turn, the mean squared residual, and the error of the solution."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    solution_error: list[float] = field(default_factory=list)


@dataclass
class Result:
    """The curves on one problem, by method and seed.

    Attributes:
        problem: its name.
        tuning: the errors with each setting, for methods that have several.
        settings: the settings that were chosen.
        curves: the runs.
        left_out: why methods have no curves.
    """

    problem: str
    tuning: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def medians(self, method: str, quantity: str) -> list[float]:
        """The median over the runs of a quantity, after each turn."""
        runs = [getattr(curve, quantity) for curve in self.curves[method]]
        return [statistics.median(values) for values in zip(*runs, strict=True)]


def section(result: Result) -> Section:
    """Rows of a table, with medians over the runs. The errors of ours are compared with the least of the others."""
    rows = []
    errors = {method: result.medians(method, "error")[-1] for method in result.curves}
    others = [error for method, error in errors.items() if not method.startswith(OURS)]
    for method, curves in result.curves.items():
        last = [curve.error[-1] for curve in curves]
        numbers = (
            f"{result.medians(method, 'steps')[-1]:.0f}",
            f"{statistics.median(1e3 * curve.seconds[-1] / curve.steps[-1] for curve in curves):.2f}",
            f"{errors[method]:.1e}",
            f"{min(last):.0e} to {max(last):.0e}",
            f"{result.medians(method, 'solution_error')[-1]:.1e}" if curves[0].solution_error else "",
        )
        beside = f"{min(others) / errors[method]:.2g}" if others and method.startswith(OURS) else ""
        rows.append(["" if rows else result.problem, method, result.settings[method], *numbers, beside])
    left_out = {method: f"left out: {shorten(why, REASON_WIDTH)}" for method, why in result.left_out.items()}
    return rows + [["", method, why, *[""] * 6] for method, why in left_out.items()]


def draw(results: list[Result], path: str) -> None:
    """Write a PNG: a panel for each problem, with the median error of each method against seconds."""
    rows = -(-len(results) // COLUMNS)
    columns = min(len(results), COLUMNS)
    figure = new_figure(4.6 * columns, 0.6 + 3.4 * rows)
    colours = {method: f"C{n}" for n, method in enumerate(dict.fromkeys(m for r in results for m in r.curves))}
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, result in zip(panels, results, strict=False):
        for method in result.curves:
            width = 2 if method.startswith(OURS) else 1.2
            seconds, errors = result.medians(method, "seconds"), result.medians(method, "error")
            panel.plot(seconds, errors, color=colours[method], linewidth=width, label=method)
        panel.set(title=result.problem, yscale="log", xlabel="seconds", ylabel="mean squared residual")
        panel.grid(alpha=0.3)
    for panel in list(panels)[len(results) :]:
        panel.set_visible(False)
    handles = {label: line for p in figure.axes for line, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    save(figure, path)
