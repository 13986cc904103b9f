"""A training step of RGD, and of other packages along its direction, against one of SGD: time and peak memory.

Float32 where the name says nothing else; on CUDA convolutions use TF32 as torch does by default, but where directions
are compared. Ours are compared with float64 on a few samples, those of the others with ours on the batch. Times are
those of the host, launches included, up to when the device is done. Memory is counted over two first steps, beside what
is allocated before them. On CUDA also the kernels launched in a step, and a profile of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch

from .candidates import candidates, compare_with_float64
from .environment import clocks
from .measure import host_clock, interleave, synchronize
from .memory import limited_memory
from .models import Case, cases
from .report import show, write_json
from .selection import chosen, run_cases
from .step_profile import profiled
from .step_result import HEADER, Result, section
from .training_steps import OURS, UNDER_AUTOCAST

# A training makes one step after the other: what a change of arms does to caches and heap is not its price. It is
# little where a step takes long.
CONSECUTIVE = 4
LONG = 500  # milliseconds

# By device, milliseconds for all of our arms on a model, and for each peer; and the fewest and the most rounds.
OURS_TIME, PEER_TIME = {"cpu": 20_000, "cuda": 4_000}, {"cpu": 10_000, "cuda": 2_000}
LEAST, MOST, QUICK = 3, 60, 5


def repeat(step: Callable[[], None]) -> None:
    for _ in range(CONSECUTIVE):
        step()


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
    with limited_memory(device):
        result.milliseconds = interleave(timed, rounds, warm_up=0, counts=counts) | once
    return result


def run(device: str, quick: bool, json: str | None, only: Sequence[str]) -> list[str]:
    """Run the models that `only` chooses, print tables and write the raw samples; returns what failed."""
    before = clocks()
    torch.manual_seed(0)
    results: list[Result] = []
    failures = []

    def save() -> None:
        if json:
            record = {"benchmark": "steps", "device": device, "failures": failures}
            write_json(json, record | {"models": [asdict(result) for result in results]}, before)

    def report(result: Result) -> None:
        results.append(result)
        show(HEADER, [section(result)], f"training step, {device}")
        for arm, profile in result.profiles.items():
            print(f"{result.model}: {arm}\n{profile}", flush=True)
        save()  # so that results stay if the rest is interrupted

    run_cases(chosen(cases(quick, device), only), partial(bench, device=device, quick=quick), report, failures)
    save()
    return failures
