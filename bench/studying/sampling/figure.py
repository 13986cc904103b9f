"""The figure of the comparison of batches with the data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rgd_ext.commands.colours import GREY

from ..contests.ratios import ratio_to_baseline
from ..inference import Interval, mean
from ..plotting import COLOURS
from .comparison import POINTS
from .settings import Setting
from .summary import D_OF, SHOWN

STYLES = dict(zip(POINTS, ("-", "--", ":"), strict=True))
COLOUR_OF = dict(zip(D_OF, COLOURS, strict=True))
COSINES = {"mean": ("D_B mu", GREY), "data": ("D g_B", COLOUR_OF["data"]), "batch": ("D_B g_B", COLOUR_OF["batch"])}


def draw(figure: Any, found: Sequence[Setting]) -> None:
    """A column for each training; rows: largest eigenvalues, lengths of corrections, cosines, and gains by step."""
    trainings, steps = (list(dict.fromkeys(getattr(each, name) for each in found)) for name in ("training", "step"))
    rows: dict[str, Callable[..., None]] = {
        "lambda_max(D_B)\n/ lambda_max(D)": partial(by_step, quantity="eigenvalue"),
        "|eps D g_B| / |g_B|": partial(by_step, quantity="length data"),
        f"cosine with D mu,\nstep {SHOWN}": cosines,
        **{f"decrease of loss\n/ SGD's, step {step}": partial(gains, step=step) for step in steps},
    }
    panels = figure.subplots(len(rows), max(len(trainings), 1), sharex="col", sharey="row", squeeze=False)
    for training, column in zip(trainings, panels.T, strict=False):
        of_training = [each for each in found if each.training == training]
        column[0].set_title("\n".join(training), fontsize="small")
        for axes, fill in zip(column, rows.values(), strict=True):
            fill(axes, of_training)
        sizes = sorted({each.size for each in of_training})
        column[-1].set_xscale("log")
        column[-1].set_xticks(sizes, list(map(str, sizes)), fontsize="small")
        column[-1].minorticks_off()
        column[-1].set_xlabel("batch size B")
    for axes, label in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(label, fontsize="small")
    for axes in (panels[0, 0], *panels[2:4, 0]) if found else ():  # the other rows have the same lines as one of these
        axes.legend(fontsize="x-small")


def by_step(axes: Any, found: Sequence[Setting], quantity: str) -> None:
    """A line for each step."""
    for step in dict.fromkeys(each.step for each in found):
        of_step = [each for each in found if each.step == step]
        means = [mean(each.values(quantity)) for each in of_step]
        line(axes, of_step, means, GREY, f"step {step}", STYLES[step])


def cosines(axes: Any, found: Sequence[Setting]) -> None:
    """What comes of the wrong matrix, the wrong vector, and both."""
    of_step = [each for each in found if each.step == SHOWN]
    for name, (label, colour) in COSINES.items():
        line(axes, of_step, [mean(each.values(f"cosine {name}")) for each in of_step], colour, label)


def gains(axes: Any, found: Sequence[Setting], step: int) -> None:
    """A line for each owner of D."""
    of_step = [each for each in found if each.step == step]
    for owner, colour in COLOUR_OF.items():
        ratios = [ratio_to_baseline(each.decreases.gains[owner]) for each in of_step]
        line(axes, of_step, ratios, colour, f"D of {D_OF[owner]}")
    axes.axhline(1, color=GREY, linewidth=0.8)


def line(
    axes: Any, found: Sequence[Setting], intervals: Sequence[Interval], colour: str, label: str, style: str = "-"
) -> None:
    """The means against the size of the batch, with the ends of the intervals."""
    means = [each.mean for each in intervals]
    ends = [[each.mean - each.low for each in intervals], [each.high - each.mean for each in intervals]]
    sizes = [each.size for each in found]
    axes.errorbar(sizes, means, ends, color=colour, linestyle=style, marker="o", markersize=3, label=label)
    axes.grid(alpha=0.3)
