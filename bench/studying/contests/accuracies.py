"""Tables and figures of accuracies: methods beside SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from ..data.defects import described
from ..inference import Comparison
from ..plotting import COLOURS, dots, panels_of_methods
from ..question import Table, slug
from .contest import Entry, grouped

WORDS: dict[str, Callable[[Any], str]] = {"labels": described, "batch_size": "B = {}".format}


@dataclass(frozen=True)
class Layout:
    """How accuracies are arranged.

    Attributes:
        tables: entries of the configuration; each of their values has a table, and a row of the figure.
        columns: entries whose values have columns of the table, and panels of the figure.
        measures: entries of the outcome and what they are called; each of them has its own columns.
    """

    tables: Sequence[str]
    columns: Sequence[str]
    measures: Mapping[str, str]


@dataclass(frozen=True)
class Column:
    """The accuracies of all methods in one setting.

    Attributes:
        table: the values of `Layout.tables`.
        key: those of `Layout.columns`, and the measure.
        title: what the first ones mean.
        heading: what the second ones mean.
        baseline: the name of the baseline, and its mean accuracy in percent.
        comparisons: accuracies less those of the baseline, in percentage points, by method.
    """

    table: tuple[Any, ...]
    key: tuple[Any, ...]
    title: str
    heading: str
    baseline: tuple[str, float]
    comparisons: Mapping[str, Comparison]

    @property
    def cells(self) -> dict[str, str]:
        """By method."""
        name, accuracy = self.baseline
        return {name: f"{accuracy:.1f} %"} | {name: text(each) for name, each in self.comparisons.items()}


def columns(entries: Iterable[Entry], layout: Layout) -> list[Column]:
    """All settings and measures."""
    found, split = [], len(layout.tables)
    for key, group in grouped(entries, *layout.tables, *layout.columns).items():
        for measure, words in layout.measures.items():
            percent = partial(Entry.percent, name=measure)
            of_table, of_column = key[:split], (*key[split:], measure)
            heading = ", ".join(filter(None, [in_words(layout.columns, key[split:]), words]))
            baseline = group.baseline.config["method"], fmean(percent(group.baseline))
            title = in_words(layout.tables, of_table)
            found.append(Column(of_table, of_column, title, heading, baseline, group.compared(percent)))
    return found


def in_words(names: Iterable[str], values: Iterable[Any]) -> str:
    """Entries of a configuration for a heading."""
    return ", ".join(WORDS.get(name, str)(value) for name, value in zip(names, values, strict=True))


def by_table(found: Iterable[Column]) -> dict[tuple[Any, ...], list[Column]]:
    """The columns of each table."""
    of_tables: dict[tuple[Any, ...], list[Column]] = {}
    for column in found:
        of_tables.setdefault(column.table, []).append(column)
    return of_tables


def text(comparison: Comparison) -> str:
    """A difference with its interval, and a star where it differs from 0 after Holm's correction."""
    found = comparison.difference
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f}){' *' * comparison.significant}"


def tables(found: Iterable[Column]) -> dict[str, Table]:
    """A row for each method. The row of the baseline has accuracies, the others have differences from them."""
    return {f"table.{slug(*key)}": table(of_table) for key, of_table in by_table(found).items()}


def table(found: Sequence[Column]) -> Table:
    """The columns beside each other; methods that were not run in a setting have an empty cell."""
    methods = dict.fromkeys(name for column in found for name in column.cells)
    rows = [[name, *(column.cells.get(name, "") for column in found)] for name in methods]
    return Table(("method", *(column.heading for column in found)), rows)


def numbers(found: Iterable[Column]) -> dict[str, str]:
    """Differences, such as digits.mlp.clean.accuracy.spectral_0_5; of SGD, the accuracy."""
    texts = {}
    for column in found:
        name, accuracy = column.baseline
        key = *column.table, *column.key
        texts[slug(*key, name)] = f"{accuracy:.1f}"
        texts |= {slug(*key, name): f"{each.difference.mean:+.1f}" for name, each in column.comparisons.items()}
    return texts


def draw(figure: Any, found: Sequence[Column]) -> None:
    """A panel for each column of the tables, with the difference of each method's accuracy from SGD's."""
    rows = list(by_table(found).values())
    methods = list(dict.fromkeys(name for column in found for name in column.comparisons))
    panels = panels_of_methods(figure, len(rows), max(map(len, rows), default=0), methods, sharex="row")
    for row, of_row in zip(rows, panels, strict=False):
        for column, axes in zip(row, of_row, strict=False):
            axes.set_title(f"{column.title}\n{column.heading}", fontsize="small")
            intervals = {name: each.difference for name, each in column.comparisons.items()}
            dots(axes, list(intervals.values()), [methods.index(name) for name in intervals], COLOURS[0], "")
            axes.axvline(0, color="#444444", linewidth=0.8)
            axes.tick_params(labelsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("test accuracy less SGD's, percentage points", fontsize="small")
