"""The measurements of training steps on one model, and how they are printed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from textwrap import shorten

from ..measuring.report import Section
from ..measuring.timing import Samples, ratio_text

HEADER = (
    "model",
    "step",
    "median ms",
    "min ms",
    "time / SGD (quartiles)",
    "peak MiB",
    "peak / SGD",
    "launches",
    "error",
)
REASON_WIDTH = 60  # in the table; the JSON has the whole text


def graph_of(arm: str) -> str:
    """The name of an arm whose steps are replayed as a CUDA graph."""
    return f"{arm}, as a CUDA graph"


@dataclass
class Result:
    """The measurements of one model, by arm. Our errors are differences from float64, those of peers from ours."""

    model: str
    milliseconds: Samples = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    profiles: dict[str, str] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def section(result: Result) -> Section:
    """Rows of a table. Times and memory are compared with those of SGD."""
    rows = []
    for name, times in result.milliseconds.items():
        peak, wrong = result.peak_bytes.get(name), result.error.get(name)
        time = f"{statistics.median(times):.2f}", f"{min(times):.2f}", ratio_text(result.milliseconds, name, "SGD")
        memory = (f"{peak / 2**20:.1f}", f"{peak / result.peak_bytes['SGD']:.2f}") if peak else ("", "")
        numbers = *time, *memory, str(result.launches.get(name, "")), "" if wrong is None else f"{wrong:.0e}"
        rows.append(["" if rows else result.model, name, *numbers])
    left_out = result.left_out.items()
    return rows + [["", name, "left out", "", shorten(why, REASON_WIDTH), "", "", "", ""] for name, why in left_out]
