"""Tables and figures of question 5: the losses that methods reach on their training set in equal numbers of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from math import exp, log
from typing import Any

from ..inference import Comparison, Interval, against, mean
from ..plotting import COLOURS, dots, logarithmic
from ..question import Table, slug
from .contest import Entry, Group, grouped

SETTING = ("data", "batch_size", "momentum")  # what has the same baseline
HEADER = ("B", "momentum", "method", "training loss", "loss / SGD's", "best rate", "largest rate", "test accuracy, %")


def logarithms(entry: Entry) -> list[float]:
    """Of the losses at the end, by seed. A training that diverged has the loss at its start."""
    pairs = zip(entry.values("training_loss"), entry.values("initial_loss"), strict=True)
    return [log(initial if loss is None else loss) for loss, initial in pairs]


def compared(group: Group) -> dict[str, Comparison]:
    """The logarithms of the losses less those of SGD, by method."""
    others = {name: logarithms(entry) for name, entry in group.items() if entry is not group.baseline}
    return against(logarithms(group.baseline), others)


def ratio_to_baseline(comparison: Comparison) -> Interval:
    """The ratio of geometric means."""
    found = comparison.difference
    return Interval(exp(found.mean), exp(found.low), exp(found.high))


def table(entries: Iterable[Entry], largest_rate: Callable[[Entry], float | None]) -> Table:
    """A row for each method in each setting of one data set."""
    rows = []
    for (batch_size, momentum), group in grouped(entries, "batch_size", "momentum").items():
        comparisons = compared(group)
        for name, entry in group.items():
            ratio = ratio_text(comparisons[name]) if name in comparisons else "1"
            rows.append([str(batch_size), f"{momentum:g}", name, *cells(entry, ratio, largest_rate(entry))])
    return Table(HEADER, rows)


def cells(entry: Entry, ratio: str, largest_rate: float | None) -> list[str]:
    """The columns from the training loss on; that is a geometric mean."""
    accuracy = mean([100 * each for each in entry.values("accuracy")])
    diverged = sum(entry.values("diverged"))
    return [
        f"{exp(mean(logarithms(entry)).mean):.3g}" + f" ({diverged} diverged)" * (diverged > 0),
        ratio,
        f"{entry.config['lr']:g}",
        "" if largest_rate is None else f"{largest_rate:g}",
        f"{accuracy.mean:.1f} ({accuracy.low:.1f} to {accuracy.high:.1f})",
    ]


def ratio_text(comparison: Comparison) -> str:
    """A ratio with its interval, and a star where it differs from 1 after Holm's correction."""
    found = ratio_to_baseline(comparison)
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f}){' *' * comparison.significant}"


def numbers(entries: Iterable[Entry]) -> dict[str, str]:
    """Ratios of losses by data, batch, momentum and method, such as digits.50.0_9.spectral_0_5."""
    return {
        slug(*setting, name): f"{ratio_to_baseline(comparison).mean:.2g}"
        for setting, group in grouped(entries, *SETTING).items()
        for name, comparison in compared(group).items()
    }


def draw(figure: Any, entries: Sequence[Entry]) -> None:
    """A panel for each data set and batch size, with the ratio of each method's loss to SGD's."""
    groups = grouped(entries, *SETTING)
    data, sizes, momenta = (sorted({key[at] for key in groups}) for at in range(3))
    methods = list(dict.fromkeys(name for group in groups.values() for name in compared(group)))
    panels = figure.subplots(max(len(data), 1), max(len(sizes), 1), sharex=True, sharey=True, squeeze=False)
    for (name, size), axes in zip(product(data, sizes), panels.flat, strict=False):
        axes.set_title(f"{name}, B = {size}", fontsize="medium")
        for at, momentum in enumerate(momenta):
            group = groups.get((name, size, momentum))
            ratios = {method: ratio_to_baseline(each) for method, each in compared(group).items()} if group else {}
            places = [methods.index(method) + 0.3 * (at - (len(momenta) - 1) / 2) for method in ratios]
            dots(axes, list(ratios.values()), places, COLOURS[at], f"momentum {momentum:g}")
        axes.axvline(1, color="#444444", linewidth=0.8)
        axes.set_xscale("log")
        logarithmic(axes.xaxis)
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("training loss at the end / SGD's")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
