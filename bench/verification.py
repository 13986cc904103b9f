"""What the verification of a capture costs: the first step with and without it, and every later one."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .measuring.memory import extra_memory
from .measuring.report import Record, Section, show
from .measuring.selection import chosen
from .measuring.timing import Samples, host_clock, interleave, synchronize
from .training.arms import Arm, Training, ordinary, rgd, step
from .training.models import Case, Example, cases

HEADER = ("model", "first step, verified, ms", "not verified, ms", "difference, in steps", "later steps", "peak memory")
ARMS = {"verified": True, "not verified": False}


def with_dropout(case: Case) -> Case:
    """The model with dropout after each of its parts."""

    def between(parts: nn.Module) -> nn.Sequential:
        return nn.Sequential(*[each for part in parts for each in (part, nn.Dropout(0.1))][:-1])

    def build() -> Example:
        model, x, y = case.build()
        if isinstance(model, nn.Sequential):
            return between(model), x, y
        model.blocks = between(model.blocks)
        return model, x, y

    return Case(build)


def first_step(model: nn.Module, x: Tensor, y: Tensor, verify: bool) -> None:
    """Capture, make a step, and remove the capture."""
    optimizer = rgd(model, verify=verify)
    step(optimizer, ordinary(model, x, y))
    optimizer.zero_grad()
    optimizer.preconditioner.remove()


def bench(case: Case, device: str, rounds: int) -> tuple[Samples, dict[str, int]]:
    """Milliseconds of first and later steps, and the peak memory of a first step."""
    model, x, y = case.build()
    model, x, y = model.to(device), x.to(device), y.to(device)
    wait, timed, memory = synchronize(device), {}, {}
    for name, verify in ARMS.items():
        run = partial(first_step, copy.deepcopy(model), x, y, verify)
        run()
        memory[name] = extra_memory(run, device)
        timed[f"first, {name}"] = host_clock(run, 1, wait)
        later = Training(Arm(partial(rgd, verify=verify)), model, x, y)
        timed[f"later, {name}"] = host_clock(later, 1, wait)
    return interleave(timed, rounds), memory


def section(name: str, samples: Samples, memory: dict[str, int]) -> Section:
    """The row of a table."""
    first, plain, later, plain_later = (
        samples[f"{which}, {arm}"] for which in ("first", "later") for arm in ("verified", "not verified")
    )
    steps = statistics.median((a - b) / step for a, b, step in zip(first, plain, plain_later, strict=True))
    ratio = statistics.median(a / b for a, b in zip(later, plain_later, strict=True))
    times = [f"{statistics.median(each):.4g}" for each in (first, plain)]
    return [[name, *times, f"{steps:.2f}", f"{ratio:.3f}", f"{memory['verified'] / memory['not verified']:.2f}"]]


def run(device: str, quick: bool, json: str | None, only: Sequence[str]) -> list[str]:
    """Run the models that `only` chooses, print a table and write the raw samples."""
    record = Record(json, "verification", device)
    torch.manual_seed(0)
    models = dict(list(cases(quick).items())[:3])
    models |= {f"{name}, dropout": with_dropout(case) for name, case in models.items()}
    found = {name: bench(case, device, 3 if quick else 30) for name, case in chosen(models, only).items()}
    show(HEADER, [section(name, *result) for name, result in found.items()], f"verification, {device}")
    results = {name: {"milliseconds": samples, "bytes": memory} for name, (samples, memory) in found.items()}
    record.write(results=results)
    return []
