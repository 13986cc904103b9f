"""Timing: interleaved arms, warm-up, medians, ratios with their spread, and a JSON record of the raw samples."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import rgd_ext

Samples = dict[str, list[float]]


def interleave(arms: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> Samples:
    """Milliseconds per call: every round runs each arm once, so a disturbance hits all of them."""
    samples: Samples = {name: [] for name in arms}
    for repeat in range(warm_up + rounds):
        for name, arm in arms.items():
            begin = time.perf_counter()
            arm()
            elapsed = time.perf_counter() - begin
            if repeat >= warm_up:
                samples[name].append(1e3 * elapsed)
    return samples


def fastest(samples: Samples, names: list[str]) -> str:
    """The arm of `names` with the smallest median."""
    return min(names, key=lambda name: statistics.median(samples[name]))


def ratio(samples: Samples, name: str, other: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of time(name) / time(other), taken round by round."""
    ratios = [a / b for a, b in zip(samples[name], samples[other], strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return median, lower, upper


def show(results: dict[str, Samples], title: str) -> None:
    """Print a table; the first arm of each part is what the others are compared with."""
    table = Table("what", "arm", "median ms", "min ms", "time / first (quartiles)", title=title)
    for what, samples in results.items():
        first = next(iter(samples))
        for name, times in samples.items():
            middle, lower, upper = ratio(samples, name, first)
            spread = "" if name == first else f"{middle:.2f} ({lower:.2f} to {upper:.2f})"
            row = [f"{statistics.median(times):.2f}", f"{min(times):.2f}", spread]
            table.add_row(what if name == first else "", name, *row, end_section=name == list(samples)[-1])
    Console().print(table)


def cpu_model() -> str:
    """The name of the processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit the benchmark ran at, with `-dirty` for uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def environment() -> dict[str, object]:
    """What a number needs beside it to be read later."""
    return {
        "torch": torch.__version__,
        "commit": commit(),
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "build": rgd_ext.build_info(),
    }


def write_json(path: str, results: dict[str, object]) -> None:
    """Write `results` beside the environment they were measured in."""
    text = json.dumps({"environment": environment(), **results}, indent=1)
    Path(path).write_text(text + "\n")
