"""Tables and figures of accuracies: methods beside SGD, by training and labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from ..comparisons import Comparison, Interval, against
from ..data.corruption import described
from ..plotting import COLOURS, dots
from ..question import Table, slug
from .contest import Entry, grouped, named

SGD = "SGD"
TRAINING = ("data", "model")


def percent(entry: Entry) -> list[float]:
    """Test accuracies by seed."""
    return [100 * value for value in entry.values("accuracy")]


def compared(group: Sequence[Entry]) -> dict[str, Comparison]:
    """Accuracies less those of SGD, in percentage points."""
    accuracies = {name: percent(entry) for name, entry in named(group).items()}
    return against(accuracies.pop(SGD), accuracies)


def tables(entries: Iterable[Entry]) -> dict[str, Table]:
    """One for each training: a row for each method, a column for each kind of labels."""
    return {f"table.{slug(*training)}": table(group) for training, group in grouped(entries, *TRAINING).items()}


def table(entries: Sequence[Entry]) -> Table:
    by_labels = {labels: group for (labels,), group in grouped(entries, "labels").items()}
    columns = {labels: column(group) for labels, group in by_labels.items()}
    group = next(iter(by_labels.values()))
    times = {name: entry.relative_time(group[0].config["steps"]) for name, entry in named(group).items()}
    header = ("method", "time / SGD's", *(described(labels) for labels in columns))
    return Table(
        header,
        [
            [name, "" if time is None else f"{time:.2f}", *(cells.get(name, "") for cells in columns.values())]
            for name, time in times.items()
        ],
    )


def column(group: Sequence[Entry]) -> dict[str, str]:
    """The accuracy of SGD, and the differences from it with their intervals, by method."""
    baseline = percent(named(group)[SGD])
    differences = {name: difference_text(each) for name, each in compared(group).items()}
    return {SGD: f"{sum(baseline) / len(baseline):.1f} %", **differences}


def difference_text(comparison: Comparison) -> str:
    """With its interval, and a star where it differs from 0 after Holm's correction."""
    found = comparison.difference
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f}){' *' * comparison.significant}"


def numbers(entries: Iterable[Entry]) -> dict[str, str]:
    """Differences by data, model, labels and method, such as digits.mlp.clean.spectral_0_5; of SGD, the accuracy."""
    found = {}
    for setting, group in grouped(entries, *TRAINING, "labels").items():
        baseline = percent(named(group)[SGD])
        found[slug(*setting, SGD)] = f"{sum(baseline) / len(baseline):.1f}"
        found |= {slug(*setting, name): f"{each.difference.mean:+.1f}" for name, each in compared(group).items()}
    return found


def draw(figure: Any, entries: Sequence[Entry]) -> None:
    """A panel for each training and kind of labels, with the difference of each method's accuracy from SGD's."""
    groups = grouped(entries, *TRAINING, "labels")
    trainings = list(dict.fromkeys(key[:2] for key in groups))
    labels = list(dict.fromkeys(key[2] for key in groups))
    methods = list(dict.fromkeys(name for group in groups.values() for name in named(group) if name != SGD))
    panels = figure.subplots(len(trainings), len(labels), sharex="row", sharey=True, squeeze=False)
    for (training, kind), axes in zip(product(trainings, labels), panels.flat, strict=True):
        axes.set_title(f"{', '.join(training)}\n{described(kind)}", fontsize="small")
        intervals: dict[str, Interval] = {}
        if (*training, kind) in groups:
            intervals = {name: each.difference for name, each in compared(groups[(*training, kind)]).items()}
        dots(axes, list(intervals.values()), [methods.index(name) for name in intervals], COLOURS[0], "")
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.tick_params(labelsize="small")
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("test accuracy less SGD's, percentage points", fontsize="small")
