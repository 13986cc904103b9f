"""Tables and figures of accuracies: methods beside SGD."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rgd_ext.commands.colours import GREY

from ..plotting import COLOURS, dots, panels_of_methods
from ..question import Table, slug
from .columns import Column, by_table, points
from .summary import summaries, summary_table

TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30)  # percentage points


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

    Also the entries of the summary, such as clean.accuracy.spectral_0_5.mean, or least, largest, above, below.
    """
    texts = {
        slug(*key, name, number): str(getattr(summary, number))
        for key, of_key in summaries(found).items()
        for name, summary in of_key.items()
        for number in ("mean", "least", "largest", "above", "below")
    }
    for column in found:
        name, accuracy = column.baseline
        key = *column.table, *column.key
        texts[slug(*key, name)] = f"{accuracy:.1f}"
        texts |= {slug(*key, name): points(each.difference.mean) for name, each in column.comparisons.items()}
    return texts


def draw(figure: Any, found: Sequence[Column]) -> None:
    """A row of panels for each table: the difference of each method's accuracy from SGD's, by column."""
    rows = list(by_table(found).values())
    heights = list(map(height_of_row, rows)) or [1.0]
    parts = figure.subfigures(len(heights), squeeze=False, height_ratios=heights).flat
    for part, row in zip(parts, rows, strict=False):
        methods = methods_in(row)
        part.suptitle(row[0].title, fontsize="medium")
        (panels,) = panels_of_methods(part, 1, len(row), methods, sharex="all")
        for column, axes in zip(row, panels, strict=True):
            axes.set_title(column.heading.replace(", ", "\n"), fontsize="small")
            intervals = {name: each.difference for name, each in column.comparisons.items()}
            dots(axes, list(intervals.values()), [methods.index(name) for name in intervals], COLOURS[0], "")
            axes.axvline(0, color=GREY, linewidth=0.8)
            axes.tick_params(labelsize="x-small")
        set_symlog_scale(panels[0])
    figure.supxlabel("test accuracy minus SGD's, percentage points", fontsize="medium")


def height(found: Sequence[Column]) -> float:
    """Of the figure, in inches."""
    return 0.4 + sum(map(height_of_row, by_table(found).values()))


def height_of_row(row: Sequence[Column]) -> float:
    """Of its panels with their titles, in inches."""
    return 1.0 + 0.16 * len(methods_in(row))


def methods_in(found: Iterable[Column]) -> list[str]:
    """All but the baseline."""
    return list(dict.fromkeys(name for column in found for name in column.comparisons))


def set_symlog_scale(axes: Any) -> None:
    """Make the x-axis linear from -2 to 2 and logarithmic beyond, so that 1 and 30 points are both readable."""
    axes.set_xscale("symlog", linthresh=2, linscale=1)
    axes.margins(x=0.05)  # on this scale
    low, high = axes.get_xlim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
