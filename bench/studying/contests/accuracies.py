"""Tables and figures of accuracies: methods beside SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rgd_ext.commands.colours import GREY

from ..plotting import COLOURS, dots, panels_of_methods
from ..question import Table, slug
from .columns import Column, by_table
from .summary import summaries, summary_table


def tables(found: Sequence[Column]) -> dict[str, Table]:
    """Those of the layout, and a summary of all of them.

    Each has a row for each method. The row of the baseline has accuracies, the others have differences from them.
    """
    of_tables = {f"table.{slug(*key)}": table(of_table) for key, of_table in by_table(found).items()}
    return of_tables | {"summary": summary_table(found)}


def table(found: Sequence[Column]) -> Table:
    """The columns beside each other; methods that were not run in a setting have an empty cell."""
    methods = dict.fromkeys(name for column in found for name in column.cells)
    rows = [[name, *(column.cells.get(name, "") for column in found)] for name in methods]
    return Table(("method", *(column.heading for column in found)), rows)


def numbers(found: Sequence[Column]) -> dict[str, str]:
    """Differences, such as digits.mlp.clean.accuracy.spectral_0_5; of SGD, the accuracy.

    Also the entries of the summary, such as clean.accuracy.spectral_0_5.mean, or above, or below.
    """
    texts = {
        slug(*key, name, number): str(getattr(summary, number))
        for key, of_key in summaries(found).items()
        for name, summary in of_key.items()
        for number in ("mean", "above", "below")
    }
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
            axes.axvline(0, color=GREY, linewidth=0.8)
            axes.tick_params(labelsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("test accuracy less SGD's, percentage points", fontsize="small")
