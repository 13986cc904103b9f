"""A training step of RGD, and of other packages along its direction, against one of SGD: time and peak memory.

Float32; on CUDA convolutions use TF32 as torch does by default, but where directions are compared. Ours are compared
with float64 on a few samples, those of the others with ours on the batch. Times are those of the host, launches
included, up to when the device is done. Memory is counted in a step of its own, beside what is allocated before it.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from textwrap import shorten

import torch
from torch import Tensor, nn

from . import oracle
from .environment import clocks
from .measure import Clock, Samples, host_clock, interleave, ratio_text
from .memory import extra_memory, limited_memory
from .models import Case, cases
from .report import Section, reason, show, write_json
from .training_steps import FRACTION, OURS, PEERS, Training

HEADER = ("model", "step", "median ms", "min ms", "time / SGD (quartiles)", "peak MiB", "peak / SGD", "error")
REASON_WIDTH = 60  # in the table; whole in the JSON

# A training makes one step after the other: what a change of arms does to caches and heap is not its price. It is
# little where a step takes long.
CONSECUTIVE = 4
LONG = 500  # milliseconds

# Milliseconds of all of ours on a model, and of each peer; and the least and most rounds.
OURS_TIME, PEER_TIME = 20_000, 10_000
LEAST, MOST, QUICK = 3, 60, 5

# Convolutions on CUDA may round more (Winograd, FFT). Rayleigh divides by g^T D g, which is small beside |g|^4 where
# the samples nearly agree.
TOLERANCE = {"cpu": {"Spectral": 1e-5, "Rayleigh": 1e-4}, "cuda": {"Spectral": 1e-4, "Rayleigh": 1e-3}}
# Peers may round the forward otherwise, which moves inputs of ReLUs across the kink.
PEER_TOLERANCE = 1e-2


@dataclass
class Result:
    """What was measured of one model, by arm."""

    model: str
    milliseconds: Samples = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def without_tf32() -> AbstractContextManager:
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def compare_with_float64(model: nn.Module, x: Tensor, y: Tensor, result: Result) -> None:
    """The directions of ours against those from explicit gradients; AssertionError where one is not exact."""
    for name in OURS:
        policy = name.removeprefix("RGD ")
        if policy == name:
            continue
        with without_tf32(), oracle.Sides() as sides:
            training = Training(OURS[name], model, x, y)
            training()
        if not result.error:
            grads = oracle.per_sample_grads(model, x, y, sides)
        wanted = oracle.direction(grads, policy, FRACTION)
        wrong = result.error[name] = oracle.relative_error(training.direction(), wanted)
        if not wrong < TOLERANCE[x.device.type][policy]:
            raise AssertionError(f"{name}: the direction differs from float64 by {wrong:.1e}")


def trainings(model: nn.Module, x: Tensor, y: Tensor, quick: bool, result: Result) -> Iterator[tuple[str, Training]]:
    """The arms that run and agree; records errors and memory, and why peers are left out."""
    directions = {}
    for name, arm in (OURS if quick else OURS | PEERS).items():
        try:
            training = Training(arm, model, x, y)
            with without_tf32():
                if arm.same_as is None:
                    training()
                    directions[name] = [part.clone() for part in training.direction()]
                    training.optimizer.zero_grad()
                    # A step of its own, since ours plan in the first.
                    result.peak_bytes[name] = extra_memory(training, x.device.type)
                else:
                    # The first step, as those of peers are long.
                    result.peak_bytes[name] = extra_memory(training, x.device.type)
                    compare_with_ours(name, training.direction(), arm.same_as, directions, result)
        except Exception as problem:
            if arm.same_as is None:
                raise
            result.left_out[name] = reason(problem)
            result.peak_bytes.pop(name, None)
            training = None
            gc.collect()  # hooks make cycles
            continue
        yield name, training


def compare_with_ours(
    name: str, direction: list[Tensor], ours: str, directions: dict[str, list[Tensor]], result: Result
) -> None:
    """AssertionError where a peer went elsewhere."""
    wrong = result.error[name] = oracle.relative_error(direction, directions[ours])
    if not wrong < PEER_TOLERANCE:
        raise AssertionError(f"its direction differs from that of {ours} by {wrong:.1e}")


def repeat(step: Callable[[], None]) -> None:
    for _ in range(CONSECUTIVE):
        step()


def bench(name: str, case: Case, device: str, quick: bool) -> Result:
    """Agreement, memory and times of all arms on one model."""
    result = Result(name)
    model, x, y = (part.to(device) for part in case.build())
    compare_with_float64(model, x[: case.samples], y[: case.samples], result)
    arms = dict(trainings(model, x, y, quick, result))
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    alone: dict[str, Clock] = {name: host_clock(arm, 1, synchronize) for name, arm in arms.items()}
    price = {name: times[0] for name, times in interleave(alone, 1, warm_up=0).items()}
    timed, steps = alone, 1
    if price["SGD"] < LONG:
        steps = 1 + CONSECUTIVE
        timed = {
            name: host_clock(partial(repeat, arm), CONSECUTIVE, synchronize, settle=arm) for name, arm in arms.items()
        }
    rounds = int(OURS_TIME / steps / sum(price[name] for name in OURS))
    rounds = QUICK if quick else max(LEAST, min(rounds, MOST))
    counts = {name: max(1, int(PEER_TIME / steps / price[name])) for name in arms if name not in OURS}
    slow = {name: [price[name]] for name in counts if price[name] > PEER_TIME}
    timed = {name: clock for name, clock in timed.items() if name not in slow}
    result.milliseconds = interleave(timed, rounds, warm_up=0, counts=counts) | slow
    return result


def section(result: Result) -> Section:
    """Rows of a table; SGD is what the others are compared with."""
    rows = []
    for name, times in result.milliseconds.items():
        peak, wrong = result.peak_bytes[name], result.error.get(name)
        rows.append(
            [
                "" if rows else result.model,
                name,
                f"{statistics.median(times):.2f}",
                f"{min(times):.2f}",
                ratio_text(result.milliseconds, name, "SGD"),
                f"{peak / 2**20:.1f}",
                f"{peak / result.peak_bytes['SGD']:.2f}",
                "" if wrong is None else f"{wrong:.0e}",
            ]
        )
    left_out = result.left_out.items()
    return rows + [["", name, "left out", "", shorten(why, REASON_WIDTH), "", "", ""] for name, why in left_out]


def run(device: str, quick: bool, json: str | None, only: str) -> list[str]:
    """Run the models whose name contains `only`, print tables and write the raw samples; returns what failed."""
    before = clocks()
    torch.manual_seed(0)
    found = {name: case for name, case in cases(quick).items() if only in name}
    results: list[Result] = []
    failures = [] if found else [f"no model has {only!r} in its name: {', '.join(cases(quick))}"]
    try:
        for name, case in found.items():
            try:
                # Where CUDA is, address space is reserved, not used.
                with limited_memory() if device == "cpu" else nullcontext():
                    results.append(bench(name, case, device, quick))
            except Exception as problem:
                failures.append(f"{name}: {reason(problem)}")
                continue
            show(HEADER, [section(results[-1])], f"training step, float32, {device}")
            if json:  # what is measured stays if the rest is cut off
                record = {"benchmark": "steps", "device": device, "failures": failures}
                write_json(json, record | {"models": [asdict(result) for result in results]}, before)
    except KeyboardInterrupt:
        failures.append("interrupted: the models that follow are missing")
    return failures
