"""Methods over several settings: means of their differences from SGD, and how many are clear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..inference import Comparison
from ..question import Table
from .columns import Column, points


@dataclass(frozen=True)
class Summary:
    """Differences of a method over the tables: mean, least, largest, and how many are clearly above or below."""

    comparisons: Sequence[Comparison]

    @property
    def mean(self) -> str:
        return points(fmean(self._differences))

    @property
    def least(self) -> str:
        return points(min(self._differences))

    @property
    def largest(self) -> str:
        return points(max(self._differences))

    @property
    def above(self) -> int:
        return sum(each.significant and each.difference.mean > 0 for each in self.comparisons)

    @property
    def below(self) -> int:
        return sum(each.significant and each.difference.mean < 0 for each in self.comparisons)

    @property
    def _differences(self) -> list[float]:
        return [each.difference.mean for each in self.comparisons]


def summaries(found: Sequence[Column]) -> dict[tuple[Any, ...], dict[str, Summary]]:
    """Of columns with the same key in all tables, by key and method."""
    comparisons: dict[tuple[Any, ...], dict[str, list[Comparison]]] = {}
    for column in found:
        for name, comparison in column.comparisons.items():
            comparisons.setdefault(column.key, {}).setdefault(name, []).append(comparison)
    return {key: {name: Summary(each) for name, each in of_key.items()} for key, of_key in comparisons.items()}


def summary_table(found: Sequence[Column]) -> Table:
    """A row for each method, a column for each key, with the number of tables that have it."""
    headings, of_keys = {column.key: column.heading for column in found}, summaries(found)
    counts = Counter(column.key for column in found)
    methods = dict.fromkeys(name for of_key in of_keys.values() for name in of_key)
    rows = [
        [name, *(_cell(of_key[name], counts[key]) if name in of_key else "" for key, of_key in of_keys.items())]
        for name in methods
    ]
    return Table(("method", *(f"{headings[key]} ({counts[key]})" for key in of_keys)), rows)


def _cell(summary: Summary, tables: int) -> str:
    """The mean, a + or - for each table in which it differs clearly, and of how many tables it is if not of all."""
    parts, count = [summary.mean, "+" * summary.above + "-" * summary.below], len(summary.comparisons)
    if count < tables:
        parts.append(f"[{count} of {tables}]")
    return " ".join(filter(None, parts))
