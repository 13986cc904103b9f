"""The output of a benchmark: tables, and a JSON record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from .environment import clocks, environment

Section = list[list[str]]


def reason(problem: Exception) -> str:
    """The exception in one line."""
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:200]}"


def show(header: Sequence[str], sections: list[Section], title: str) -> None:
    """Print a table of sections of rows; in plain text where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(header, sections, title))
        return
    table = Table(*header, title=title)
    for section in sections:
        for row in section:
            table.add_row(*row)
        table.add_section()
    Console(width=max(150, shutil.get_terminal_size().columns)).print(table)


def plain(header: Sequence[str], sections: list[Section], title: str) -> str:
    """The table as aligned columns."""
    rows = [list(header), *(row for section in sections for row in section)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *lines])


class Record:
    """The JSON record of a benchmark: its results, the environment, and the GPU's clocks before and after.

    Without a path nothing is written.
    """

    def __init__(self, path: str | None, benchmark: str, device: str) -> None:
        self._path, self._about = path, {"benchmark": benchmark, "device": device}
        self._clocks_before = clocks()

    def write(self, **results: object) -> None:
        """Write the results so far, in place of those that were written before."""
        if self._path is None:
            return
        measured_in = {"environment": environment(), "clocks": {"before": self._clocks_before, "after": clocks()}}
        partial = Path(f"{self._path}.partial")  # the earlier record stays complete if this write is interrupted
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(measured_in | self._about | results, indent=1) + "\n")
        partial.replace(self._path)
