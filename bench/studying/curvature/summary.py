"""Tables, figures and numbers of question 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.defects import described
from ..inference import Interval, mean
from ..plotting import COLOURS, band, logarithmic
from ..question import Finished, Line, Table
from ..ranges import ranges
from .comparison import POINTS, SHARED

QUANTITIES = {
    "loss": "training loss",
    "cosine": "cos(D g, H g)",
    "scale": "best multiple of D g",
    "shared": f"overlap of {SHARED} leading eigenvectors",
    "diffusion": "lambda_max(D)",
    "hessian": "lambda_max(H)",
}
SHOWN = (0, 60, 600)  # steps in the table


@dataclass(frozen=True)
class Setting:
    """The seeds of a model on a data set with one kind of labels."""

    data: str
    model: str
    labels: str
    lines: Sequence[Line]

    @property
    def name(self) -> str:
        return f"{self.data}, {self.model}"

    @property
    def steps(self) -> list[int]:
        """After which D and H were compared."""
        return [step for step in POINTS if step <= self.lines[0].config["steps"]]

    def curves(self, quantity: str) -> np.ndarray:
        """(seeds, points); of eigenvalues the largest."""
        values = np.array([line.outcome[quantity] for line in self.lines])
        return values[..., 0] if values.ndim == 3 else values

    def means(self, quantity: str) -> dict[int, Interval]:
        """By step."""
        return dict(zip(self.steps, map(mean, self.curves(quantity).T), strict=True))


def settings(finished: Finished) -> list[Setting]:
    """All that were run, by name."""
    return [Setting(*key, lines) for key, lines in sorted(finished.grouped("data", "model", "labels").items())]


def table(found: Sequence[Setting]) -> Table:
    """A row for each setting and step."""
    rows = []
    for setting in found:
        means = {quantity: setting.means(quantity) for quantity in QUANTITIES}
        for step in setting.steps:
            if step in SHOWN:
                cells = [means[quantity][step].text() for quantity in QUANTITIES]
                rows.append([setting.name, described(setting.labels), str(step), *cells])
    return Table(("model", "labels", "step", *QUANTITIES.values()), rows)


def numbers(found: Sequence[Setting]) -> dict[str, str]:
    """The least and the largest of the settings' means by labels, quantity and step, such as clean.cosine.600.least."""
    means = [
        ((setting.labels, quantity, step), interval.mean)
        for setting in found
        for quantity in QUANTITIES
        for step, interval in setting.means(quantity).items()
    ]
    return ranges(means, shortest=3)


def draw(figure: Any, found: Sequence[Setting]) -> None:
    """A column for each model; rows: the cosine, the multiple, and the largest eigenvalues."""
    from matplotlib.lines import Line2D

    names, labels = (list(dict.fromkeys(getattr(each, key) for each in found)) for key in ("name", "labels"))
    panels = figure.subplots(3, len(names), sharex=True, sharey="row", squeeze=False)
    for setting in found:
        column, colour = panels[:, names.index(setting.name)], COLOURS[labels.index(setting.labels)]
        column[0].set_title(setting.name)
        column[-1].set_xlabel("step")
        for axes, quantities in zip(column, (("cosine",), ("scale",), ("diffusion", "hessian")), strict=True):
            for quantity, style in zip(quantities, ("-", "--"), strict=False):
                band(axes, setting.steps, setting.curves(quantity), colour, described(setting.labels), style)
            axes.set_xscale("symlog", linthresh=20)
            axes.set_xticks(setting.steps, [str(step) for step in setting.steps])
            axes.minorticks_off()
    titles = ("cos(D g, H g)", "best multiple of D g for H g", "largest eigenvalue")
    for axes, title in zip(panels[:, 0], titles, strict=True):
        axes.set_ylabel(title)
    for axes in panels[1:].flat:
        axes.set_yscale("log")
        logarithmic(axes.yaxis)
    panels[1, 0].set_ylim(bottom=0.05)  # some of the multiples are negative
    panels[0, 0].legend(fontsize="small")
    styles = [Line2D([], [], color="black", linestyle=style, label=name) for name, style in (("D", "-"), ("H", "--"))]
    panels[2, 0].legend(handles=styles)
