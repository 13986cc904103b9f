"""Tables and figures of accuracies: methods beside SGD, by training and labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from statistics import fmean
from typing import Any

from ..data.corruption import described
from ..inference import Comparison, Interval
from ..plotting import COLOURS, dots
from ..question import Table, slug
from .contest import Entry, Group, grouped

TRAINING = ("data", "model")


def percent(entry: Entry) -> list[float]:
    """Test accuracies by seed."""
    return [100 * value for value in entry.values("accuracy")]


def compared(group: Group) -> dict[str, Comparison]:
    """Accuracies less those of SGD, in percentage points, by method."""
    return group.compared(percent)


def tables(entries: Iterable[Entry]) -> dict[str, Table]:
    """One for each training: a row for each method, a column for each kind of labels."""
    columns: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for (data, model, labels), group in grouped(entries, *TRAINING, "labels").items():
        columns.setdefault((data, model), {})[labels] = column(group)
    return {f"table.{slug(*training)}": table(of_training) for training, of_training in columns.items()}


def table(columns: dict[str, dict[str, str]]) -> Table:
    """Columns, by labels, of cells by method."""
    methods = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in methods]
    return Table(("method", *map(described, columns)), rows)


def column(group: Group) -> dict[str, str]:
    """The accuracy of SGD, and the differences from it with their intervals, by method."""
    baseline = {name: f"{fmean(percent(entry)):.1f} %" for name, entry in group.items() if entry is group.baseline}
    return baseline | {name: difference_text(each) for name, each in compared(group).items()}


def difference_text(comparison: Comparison) -> str:
    """A difference with its interval, and a star where it differs from 0 after Holm's correction."""
    found = comparison.difference
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f}){' *' * comparison.significant}"


def numbers(entries: Iterable[Entry]) -> dict[str, str]:
    """Differences by data, model, labels and method, such as digits.mlp.clean.spectral_0_5; of SGD, the accuracy."""
    found = {}
    for setting, group in grouped(entries, *TRAINING, "labels").items():
        found[slug(*setting, group.baseline.config["method"])] = f"{fmean(percent(group.baseline)):.1f}"
        found |= {slug(*setting, name): f"{each.difference.mean:+.1f}" for name, each in compared(group).items()}
    return found


def draw(figure: Any, entries: Sequence[Entry]) -> None:
    """A panel for each training and kind of labels, with the difference of each method's accuracy from SGD's."""
    comparisons = {key: compared(group) for key, group in grouped(entries, *TRAINING, "labels").items()}
    trainings, labels = (
        list(dict.fromkeys(each)) for each in ((key[:2] for key in comparisons), (key[2] for key in comparisons))
    )
    methods = list(dict.fromkeys(name for of_setting in comparisons.values() for name in of_setting))
    shape = max(len(trainings), 1), max(len(labels), 1)
    panels = figure.subplots(*shape, sharex="row", sharey=True, squeeze=False)
    for (training, kind), axes in zip(product(trainings, labels), panels.flat, strict=False):
        axes.set_title(f"{', '.join(training)}\n{described(kind)}", fontsize="small")
        intervals: dict[str, Interval] = {
            name: each.difference for name, each in comparisons.get((*training, kind), {}).items()
        }
        dots(axes, list(intervals.values()), [methods.index(name) for name in intervals], COLOURS[0], "")
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.tick_params(labelsize="small")
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("test accuracy less SGD's, percentage points", fontsize="small")
