"""The measurements of one case of `python -m bench kernels`, and how they are printed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from ..measuring.report import Section
from ..measuring.timing import Samples, fastest, ratio_text

HEADER = ("case", "arm", "median ms", "GB/s", "time / fused (quartiles)", "error", "extra MiB")


@dataclass
class Result:
    """The measurements of one case, by arm."""

    case: str
    batch_size: int
    tensors: int
    weights: int
    dtype: str
    bytes: int
    buffers: int
    milliseconds: Samples = field(default_factory=dict)
    bytes_moved: dict[str, int] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    extra_memory: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def leave_out(self, name: str, reason: str, ours: bool = False) -> None:
        self.left_out[name] = reason
        if ours:
            self.failures.append(f"{self.case}: {name}: {reason}")

    def median(self, name: str) -> float:
        return statistics.median(self.milliseconds[name])

    def bandwidth(self, name: str) -> float:
        """GB/s."""
        return self.bytes_moved[name] / self.median(name) / 1e6

    def best(self, role: str) -> str | None:
        """The fastest of the measured arms of a role; None if there is none."""
        names = [name for name in self.milliseconds if name.partition(":")[0] == role]
        return fastest(self.milliseconds, names) if names else None


def section(result: Result) -> Section:
    """Rows of a table. Times of Gramians and moments are compared with `gram`, all others with `precondition`."""
    rows = []
    for name in result.milliseconds:
        base = "gram" if name.startswith(("gram", "G @ G.T", "moments")) else "precondition"
        spread = ratio_text(result.milliseconds, name, base) if base in result.milliseconds else ""
        wrong = f"{result.error[name]:.0e}" if name in result.error else ""
        memory = f"{result.extra_memory[name] / 2**20:.1f}" if name in result.extra_memory else ""
        numbers = [f"{result.median(name):.4g}", f"{result.bandwidth(name):.0f}", spread, wrong, memory]
        rows.append([result.case if not rows else "", name, *numbers])
    return rows


def progress(result: Result) -> None:
    """Print a line with the time of `precondition` and how much longer the others take, and the arms left out."""
    ours = result.median("precondition") if "precondition" in result.milliseconds else float("nan")
    names = {role: result.best(role) for role in ("naive", "eager", "compile", "read")}
    others = [f"{role} {result.median(name) / ours:.2f}x" for role, name in names.items() if name]
    print(f"{result.case}: precondition {ours:.4g} ms; {', '.join(others)}", flush=True)
    for name, why in result.left_out.items():
        print(f"    left out: {name}: {why}", flush=True)
