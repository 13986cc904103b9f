"""Accuracies of methods beside SGD, arranged for tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from ..data.defects import described
from ..inference import Comparison
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
    found, split, names = [], len(layout.tables), (*layout.tables, *layout.columns)
    for key, group in grouped(entries, *names).items():
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
    return comparison.difference.text(points) + " *" * comparison.significant


def points(difference: float) -> str:
    """Percentage points; what rounds to zero has a plus."""
    return f"{round(difference, 1) + 0:+.1f}"
