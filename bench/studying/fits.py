"""Tables and figures of question 5: the losses that methods reach on their training set in equal numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

from .comparisons import Comparison, against, mean
from .plotting import COLOURS
from .question import Table

SGD = "SGD"


@dataclass(frozen=True)
class Fit:
    """A method at its best learning rate, with an entry of each list for each seed.

    Attributes:
        lr, largest_lr: the best rate, and the largest one that trains.
        losses: over the training set, at the end.
        accuracies: on the test set, in percent.
        time: of all steps, in units of the time of SGD's.
    """

    data: str
    batch_size: int
    momentum: float
    method: str
    lr: float
    largest_lr: float
    losses: Sequence[float]
    accuracies: Sequence[float]
    time: float


def by_setting(fits: Sequence[Fit]) -> list[list[Fit]]:
    """Those that are compared with each other, SGD first."""
    groups: dict[tuple[str, int, float], list[Fit]] = {}
    for fit in fits:
        groups.setdefault((fit.data, fit.batch_size, fit.momentum), []).append(fit)
    return list(groups.values())


def compared(fits: Sequence[Fit]) -> dict[str, Comparison]:
    """The logarithms of the losses of a setting with those of SGD."""
    sgd, *others = fits
    return against(
        [log(loss) for loss in sgd.losses], {fit.method: [log(loss) for loss in fit.losses] for fit in others}
    )


def table(fits: Sequence[Fit]) -> Table:
    """A row for each method in each setting of a data set."""
    header = ("B", "momentum", "method", "training loss", "loss / SGD's", "time / SGD's", "best rate", "largest rate")
    rows = []
    for group in by_setting(fits):
        ratios = compared(group)
        for fit in group:
            ratio = ratio_text(ratios[fit.method]) if fit.method in ratios else "1"
            losses = mean(fit.losses)
            where = [str(fit.batch_size), f"{fit.momentum:g}", fit.method]
            rates = [f"{fit.lr:g}", f"{fit.largest_lr:g}"]
            rows.append([*where, f"{losses.mean:.3g}", ratio, f"{fit.time:.2f}", *rates])
    return Table(
        (*header, "test accuracy, %"), [[*row, accuracy_text(fit)] for row, fit in zip(rows, fits, strict=True)]
    )


def accuracy_text(fit: Fit) -> str:
    found = mean(fit.accuracies)
    return f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f})"


def ratio_text(comparison: Comparison) -> str:
    """A ratio of geometric means with its interval, and a star where it differs from 1 after Holm's correction."""
    middle, low, high = (exp(each) for each in vars(comparison.difference).values())
    return f"{middle:.2f} ({low:.2f} to {high:.2f}){' *' * comparison.significant}"


def numbers(fits: Sequence[Fit]) -> dict[str, str]:
    """The ratio of losses by data, batch, momentum and method."""
    found = {}
    for group in by_setting(fits):
        for method, comparison in compared(group).items():
            name = "".join(letter if letter.isalnum() else "_" for letter in method.lower())
            fit = group[0]
            prefix = f"{fit.data.replace('-', '_')}.b{fit.batch_size}.m{round(10 * fit.momentum)}.{name}"
            found[prefix] = f"{exp(comparison.difference.mean):.2f}"
    return found


def draw(figure: Any, fits: Sequence[Fit]) -> None:
    """A panel for each data set and batch size, with the ratio of each method's loss to SGD's."""
    groups = by_setting(fits)
    data, sizes = (list(dict.fromkeys(getattr(fit, name) for fit in fits)) for name in ("data", "batch_size"))
    methods = list(dict.fromkeys(fit.method for fit in fits if fit.method != SGD))
    panels = figure.subplots(len(data), len(sizes), sharex=True, sharey=True, squeeze=False)
    for group in groups:
        fit = group[0]
        axes = panels[data.index(fit.data), sizes.index(fit.batch_size)]
        momenta = sorted({each.momentum for each in fits})
        which = momenta.index(fit.momentum)
        for method, comparison in compared(group).items():
            middle, low, high = (exp(each) for each in vars(comparison.difference).values())
            place = methods.index(method) + 0.15 * (2 * which - 1)
            label = f"momentum {fit.momentum:g}" if method == methods[-1] else None
            style = {"color": COLOURS[which], "marker": "os"[which], "markersize": 4, "linestyle": "none"}
            axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], label=label, **style)
    for place, axes in enumerate(panels.flat):
        axes.set_title(f"{data[place // len(sizes)]}, B = {sizes[place % len(sizes)]}", fontsize="medium")
        axes.axvline(1, color="#444444", linewidth=0.8)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("training loss at the end / SGD's")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
