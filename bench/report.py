"""What a benchmark leaves behind: a table and a JSON record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from .environment import clocks, environment

Section = list[list[str]]


def reason(problem: Exception) -> str:
    """Why an arm is left out, in a line."""
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:200]}"


def show(header: Sequence[str], sections: list[Section], title: str) -> None:
    """Print sections of rows under a header; as plain text where rich is not installed."""
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


def write_json(path: str, results: dict[str, object], clocks_before: dict[str, str] | None) -> None:
    """Write `results` beside the environment they were measured in."""
    record = {"environment": environment(), "clocks": {"before": clocks_before, "after": clocks()}, **results}
    partial = Path(f"{path}.partial")  # an earlier record stays complete if this write is interrupted
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
