"""Columns of tables: functions from the recorded result of a case, which is a row, to a cell."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from ..measuring.pages import markdown, number
from ..measuring.timing import ratio

Cell = Callable[[dict], str]

# What the reason for which an arm was left out says if the memory was not enough.
OUT_OF_MEMORY = "can't allocate memory", "out of memory"


def table(columns: dict[str, Cell], results: Sequence[dict]) -> str:
    """Markdown: a row for each of the results."""
    return markdown([*columns], [[cell(result) for cell in columns.values()] for result in results])


def milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.3f} ms"


def field(name: str) -> Cell:
    """A text or a number of the record, as it is."""
    return lambda result: str(result[name])


def time(arm: str) -> Cell:
    """The median of an arm's times."""
    return lambda result: milliseconds(statistics.median(result["milliseconds"][arm]))


def over(arm: str, base: str = "SGD") -> Cell:
    """The median, over the rounds, of an arm's time divided by that of another; why there is none, in a word."""

    def cell(result: dict) -> str:
        if arm in result["milliseconds"]:
            return number(ratio(result["milliseconds"], arm, base)[0])
        reason = result.get("left_out", {}).get(arm, "")
        return "memory" if any(text in reason for text in OUT_OF_MEMORY) else "-"

    return cell


def peak(arm: str) -> Cell:
    """The peak memory of an arm divided by that of SGD."""
    return lambda result: number(result["peak_bytes"][arm] / result["peak_bytes"]["SGD"])


def joined(*cells: Cell) -> Cell:
    """Several cells in one."""
    return lambda result: ", ".join(cell(result) for cell in cells)
