"""The cost of one Gauss-Newton step on one batch: its time, that of its linear system, and memory, against SGD."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import rgd_ext

from ..measuring.memory import extra_memory
from ..measuring.report import Section
from ..measuring.timing import Samples, host_clock, interleave, ratio_text, synchronize
from .methods import OURS
from .problems import mean_square, mlp, uniform

HEADER = ("model", "step", "median ms", "time / SGD (quartiles)", "peak MiB", "peak / SGD")
BATCH_SIZE = 256
CASES = {
    f"MLP 1-64-64-1, B = {BATCH_SIZE}": (1, 64, 64, 1),
    f"MLP 1-256-256-256-1, B = {BATCH_SIZE}": (1, 256, 256, 256, 1),
}
SOLUTION = "of it the linear system"
# So small that all arms stay on about the same weights. The time of a step does not depend on it.
LR = 1e-9


@dataclass
class Cost:
    """Times and memory of the steps on one model, by arm."""

    model: str
    milliseconds: Samples = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


def solve(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.cholesky_solve(vector, torch.linalg.cholesky_ex(matrix).L)


def measure(name: str, sizes: tuple[int, ...], device: str, rounds: int) -> Cost:
    """Times and memory of all arms on one model. Every timed step follows another one of the same arm."""
    with torch.device(device):
        x = 2 * uniform(BATCH_SIZE, sizes[0]) - 1
        models = {arm: mlp(*sizes) for arm in ("SGD", OURS)}
        y = torch.sin(10 * x)
        matrix = torch.eye(BATCH_SIZE, dtype=torch.float64) + y @ y.T
    sgd = torch.optim.SGD(models["SGD"].parameters(), LR)
    gauss_newton = rgd_ext.GaussNewton(models[OURS], LR, adaptive=False)

    def along_gradient() -> None:
        mean_square((models["SGD"](x) - y,)).backward()
        sgd.step()
        sgd.zero_grad()

    arms = {
        "SGD": along_gradient,
        OURS: partial(gauss_newton.step, lambda: models[OURS](x) - y),
        SOLUTION: partial(solve, matrix, y),
    }
    result, wait, timed = Cost(name), synchronize(device), {}
    for arm, step in arms.items():
        step()  # our first one is verified
        result.peak_bytes[arm] = extra_memory(step, device)
        timed[arm] = host_clock(step, 1, wait, settle=step)
    result.milliseconds = interleave(timed, rounds)
    return result


def section(result: Cost) -> Section:
    """Rows of a table."""
    rows = []
    for arm, times in result.milliseconds.items():
        peak, ratio = result.peak_bytes[arm], ratio_text(result.milliseconds, arm, "SGD")
        memory = f"{peak / 2**20:.2f}", f"{peak / result.peak_bytes['SGD']:.2f}"
        rows.append(["" if rows else result.model, arm, f"{statistics.median(times):.3f}", ratio, *memory])
    return rows
