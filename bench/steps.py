"""A training step of RGD, and of other packages along its direction, against one of SGD: time and peak memory.

Models are in float32 unless the name of the case says otherwise. On CUDA, convolutions use TF32, which is torch's
default, except where directions are compared. Our directions are compared with float64 on a few samples, and those of
the other packages with ours on the whole batch. Times are by the host's clock until the device is idle, and include
launches. Memory is the peak of two steps after the first, without what was allocated before them. On CUDA, the kernel
launches of a step are counted as well, and a profile of it is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from .measuring.memory import limited_memory
from .measuring.profiling import profiled
from .measuring.report import Record, show
from .measuring.selection import chosen, run_recorded
from .measuring.timing import host_clock, interleave, synchronize
from .training.arms import CONSECUTIVE, OURS, UNDER_AUTOCAST, repeat
from .training.candidates import candidates, compare_with_float64
from .training.graphs import graph_clocks
from .training.models import Case, cases
from .training.result import HEADER, Result, section

# Steps that take longer than these milliseconds are timed one by one: a change of arms adds little to them.
LONG = 500

# On CUDA, a step of SGD that takes less than these milliseconds is mostly launches, so graphs are timed as well.
SHORT = 10

# For each device, milliseconds for all of our arms on a model, and for each peer.
OURS_TIME, PEER_TIME = {"cpu": 20_000, "cuda": 4_000}, {"cpu": 10_000, "cuda": 2_000}
LEAST, MOST, QUICK = 3, 60, 5  # rounds


def bench(name: str, case: Case, device: str, quick: bool) -> Result:
    """Agreement, memory and times of all arms on one model."""
    result, ours = Result(name), UNDER_AUTOCAST if case.autocast else OURS
    model, x, y = (part.to(device) for part in case.build())
    with limited_memory(device):
        compare_with_float64(model, x[: case.samples], y[: case.samples], result, ours)
    arms, price = candidates(model, x, y, quick, result, ours)
    if device == "cuda":
        for name, arm in arms.items():
            result.launches[name], result.profiles[name] = profiled(arm, device)

    wait = synchronize(device)
    if price["SGD"] < LONG:
        steps = 1 + CONSECUTIVE
        timed = {name: host_clock(partial(repeat, arm), CONSECUTIVE, wait, settle=arm) for name, arm in arms.items()}
    else:
        steps, timed = 1, {name: host_clock(arm, 1, wait) for name, arm in arms.items()}
    rounds = int(OURS_TIME[device] / steps / sum(price[name] for name in OURS))
    rounds = QUICK if quick else max(LEAST, min(rounds, MOST))
    counts = {name: max(1, int(PEER_TIME[device] / steps / price[name])) for name in arms if name not in OURS}
    once = {name: [price[name]] for name in counts if price[name] > PEER_TIME[device]}
    timed = {name: clock for name, clock in timed.items() if name not in once}
    if device == "cuda" and price["SGD"] < SHORT:
        timed |= graph_clocks(model, x, y, arms, ours, result)
    with limited_memory(device):
        result.milliseconds = interleave(timed, rounds, warm_up=0, counts=counts) | once
    return result


def run(device: str, quick: bool, json: str | None, only: Sequence[str]) -> list[str]:
    """Run the models that `only` chooses, print tables and write the raw samples; returns what failed."""
    record, failures = Record(json, "steps", device), []
    torch.manual_seed(0)

    def report(result: Result) -> None:
        show(HEADER, [section(result)], f"training step, {device}")
        for arm, profile in result.profiles.items():
            print(f"{result.model}: {arm}\n{profile}", flush=True)

    models = chosen(cases(quick, device), only)
    run_recorded(record, "models", models, partial(bench, device=device, quick=quick), report, failures)
    return failures
