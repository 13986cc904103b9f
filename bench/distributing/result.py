"""The measurements of one model in several processes, and how they are printed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from ..measuring.report import Section
from ..measuring.timing import Samples, ratio_text
from .arms import base_of
from .order import in_order, wrongly_predicted

HEADER = (
    "model",
    "processes",
    "step",
    "median ms",
    "min ms",
    "time / SGD (quartiles)",
    "MB",
    "gradients",
    "predicted ms",
    "error",
)


@dataclass
class Result:
    """The measurements of one model, by arm.

    Attributes:
        model: its name.
        processes: how many.
        samples: of each process.
        gradient_bytes: of one gradient.
        milliseconds: of the slowest process.
        bytes: that a process hands to collectives in a step, see `traffic`; not with FSDP2.
        gradients: the same as a multiple of those of one gradient.
        error: relative difference from the direction of one process.
        link: latency in seconds, bandwidth in bytes per second; None for one process.
        layers: measured, see `bench.simulating.workload.Layer`.
        measured: median milliseconds of the arms that are predicted, the fastest first.
        predicted: their predicted milliseconds, the fastest first.
        wrongly_predicted: pairs of arms that clearly differ in the measured order alone.
    """

    model: str
    processes: int
    samples: int
    gradient_bytes: int
    milliseconds: Samples = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    link: dict[str, float] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    wrongly_predicted: list[str] = field(default_factory=list)

    def compare_order(self, predicted: dict[str, float]) -> None:
        """Note the predicted milliseconds, and the measured ones beside them."""
        medians = {name: statistics.median(self.milliseconds[name]) for name in predicted}
        self.predicted = predicted
        self.measured = dict(sorted(medians.items(), key=lambda pair: pair[1]))
        self.wrongly_predicted = wrongly_predicted(self.measured, predicted)


def section(result: Result) -> Section:
    """Rows of a table. Times are compared with those of SGD, with FSDP2 if the arm has it."""
    rows, model = [], result.model.partition(", B = ")[0]
    for name, times in result.milliseconds.items():
        about = ("", "") if rows else (f"{model}, {result.samples} samples each", str(result.processes))
        time = (
            f"{statistics.median(times):.1f}",
            f"{min(times):.1f}",
            ratio_text(result.milliseconds, name, base_of(name)),
        )
        sent = ("", "")
        if name in result.bytes:
            sent = f"{result.bytes[name] / 1e6:.2f}", f"{result.gradients[name]:.3f}"
        predicted, error = result.predicted.get(name), result.error.get(name)
        others = "" if predicted is None else f"{predicted:.1f}", "" if error is None else f"{error:.0e}"
        rows.append([*about, name, *time, *sent, *others])
    return rows


def orders(result: Result) -> str:
    """The measured and the predicted order, in lines."""
    lines = [f"measured:  {in_order(result.measured)}", f"predicted: {in_order(result.predicted)}"]
    wrong = result.wrongly_predicted
    return "\n".join([*lines, f"wrongly predicted: {'; '.join(wrong)}"] if wrong else lines)
