"""Tables and figures of question 5: the losses that methods reach on their training set in equal numbers of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from math import exp, log
from typing import Any

from ..comparisons import Comparison, Interval, against, mean
from ..plotting import COLOURS, dots
from ..question import Table, slug
from .contest import Entry, grouped, named

SGD = "SGD"
SETTING = ("data", "batch_size", "momentum")  # what has the same baseline
HEADER = (
    "B",
    "momentum",
    "method",
    "training loss",
    "loss / SGD's",
    "time / SGD's",
    "best rate",
    "largest rate",
    "test accuracy, %",
)


def compared(group: Sequence[Entry]) -> dict[str, Comparison]:
    """The logarithms of the losses, less those of SGD."""
    logarithms = {name: [log(loss) for loss in entry.values("training_loss")] for name, entry in named(group).items()}
    return against(logarithms.pop(SGD), logarithms)


def ratio(comparison: Comparison) -> Interval:
    """Of geometric means."""
    return Interval(*(exp(each) for each in vars(comparison.difference).values()))


def table(entries: Iterable[Entry], largest_rate: Callable[[Entry], float | None]) -> Table:
    """A row for each method in each setting."""
    rows = []
    for (batch_size, momentum), group in sorted(grouped(entries, "batch_size", "momentum").items()):
        ratios = compared(group)
        for name, entry in named(group).items():
            ratio = ratio_text(ratios[name]) if name in ratios else "1"
            where = [str(batch_size), f"{momentum:g}", name]
            rows.append([*where, *cells(entry, ratio, group[0].config["steps"], largest_rate(entry))])
    return Table(HEADER, rows)


def cells(entry: Entry, ratio: str, steps: int, largest_rate: float | None) -> list[str]:
    """From the training loss on."""
    time = entry.relative_time(steps)
    accuracy = mean([100 * each for each in entry.values("accuracy")])
    return [
        f"{mean(entry.values('training_loss')).mean:.3g}",
        ratio,
        "" if time is None else f"{time:.2f}",
        f"{entry.config['lr']:g}",
        "" if largest_rate is None else f"{largest_rate:g}",
        f"{accuracy.mean:.1f} ({accuracy.low:.1f} to {accuracy.high:.1f})",
    ]


def ratio_text(comparison: Comparison) -> str:
    """A ratio with its interval, and a star where it differs from 1 after Holm's correction."""
    found = ratio(comparison)
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f}){' *' * comparison.significant}"


def numbers(entries: Iterable[Entry]) -> dict[str, str]:
    """Ratios of losses by data, batch, momentum and method, such as digits.50.0_9.spectral_0_5."""
    return {
        slug(*setting, name): f"{ratio(comparison).mean:.2f}"
        for setting, group in grouped(entries, *SETTING).items()
        for name, comparison in compared(group).items()
    }


def draw(figure: Any, entries: Sequence[Entry]) -> None:
    """A panel for each data set and batch size, with the ratio of each method's loss to SGD's."""
    groups = grouped(entries, *SETTING)
    data, sizes, momenta = (sorted(set(each)) for each in zip(*groups, strict=True))
    methods = list(dict.fromkeys(name for group in groups.values() for name in named(group) if name != SGD))
    panels = figure.subplots(len(data), len(sizes), sharex=True, sharey=True, squeeze=False)
    for (name, size), axes in zip(product(data, sizes), panels.flat, strict=True):
        axes.set_title(f"{name}, B = {size}", fontsize="medium")
        for at, momentum in enumerate(momenta):
            ratios = {method: ratio(each) for method, each in compared(groups[name, size, momentum]).items()}
            places = [methods.index(method) + 0.3 * (at - (len(momenta) - 1) / 2) for method in ratios]
            dots(axes, list(ratios.values()), places, COLOURS[at], f"momentum {momentum:g}")
        axes.axvline(1, color="#444444", linewidth=0.8)
        axes.set_xscale("log")
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("training loss at the end / SGD's")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
