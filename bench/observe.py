"""A training step whose backward also gives statistics, by `observe` and what it can be asked for, against one of SGD.

All arms leave the plain gradient in `.grad`, which is compared with that of SGD. Statistics are not read, as in a
training that logs seldom, but for those of `record`, which writes a row for each sample. Memory is the peak of two
steps.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

import rgd_ext

from .measuring.memory import limited_memory
from .measuring.report import Record, Section, show
from .measuring.selection import chosen, run_recorded
from .measuring.timing import host_clock, interleave, ratio_text, synchronize
from .training.arms import CONSECUTIVE, OURS, Arm, ordinary, repeat, sgd
from .training.candidates import candidates
from .training.models import Case, cases
from .training.peers import Backward
from .training.result import HEADER, Result, section

OBSERVE, PER_PARAMETER = "observe", "observe, per parameter"
# Milliseconds for all arms on one model.
TIME = {"cpu": 60_000, "cuda": 4_000}
LEAST, MOST, QUICK = 5, 60, 3  # rounds
SIZE = 60_000  # of the data set that is recorded


def observed(model: nn.Module, **options: bool) -> torch.optim.Optimizer:
    """SGD on an observed model."""
    rgd_ext.observe(model, batch_norm="contribution", **options)
    return sgd(model)


def aligned(model: nn.Module) -> torch.optim.Optimizer:
    """SGD on an observed model with a vector to align with."""
    optimizer = observed(model)
    rgd_ext.handle_of(model).align([torch.randn_like(p) for p in model.parameters()])
    return optimizer


def recorded(model: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """Forward, loss and backward, and a row in a file for each sample."""
    backward, handle = ordinary(model, x, y), rgd_ext.handle_of(model)
    folder = tempfile.TemporaryDirectory()
    weakref.finalize(handle, folder.cleanup)
    handle.record_to(f"{folder.name}/epoch.npy", SIZE)
    shuffled = torch.randperm(SIZE)[: len(x)]

    def backward_and_record() -> None:
        backward()
        handle.record(shuffled)

    return backward_and_record


ARMS = {
    "SGD": OURS["SGD"],
    OBSERVE: Arm(observed, same_as="SGD"),
    PER_PARAMETER: Arm(partial(observed, per_parameter=True), same_as="SGD"),
    "observe, align": Arm(aligned, same_as="SGD"),
    "observe, record": Arm(observed, recorded, same_as="SGD"),
    "observe, gram": Arm(partial(observed, gram=True), same_as="SGD"),
}


def bench(name: str, case: Case, device: str, quick: bool) -> Result:
    """Agreement, memory and times of all arms on one model; raises AssertionError if a gradient differs."""
    result = Result(name)
    model, x, y = (part.to(device) for part in case.build())
    # Quick, so that the peers of `steps` are not among them.
    arms, price = candidates(model, x, y, quick=True, result=result, ours=ARMS)
    if result.left_out:
        raise AssertionError(str(result.left_out))
    wait = synchronize(device)
    timed = {name: host_clock(partial(repeat, arm), CONSECUTIVE, wait, settle=arm) for name, arm in arms.items()}
    rounds = int(TIME[device] / (1 + CONSECUTIVE) / sum(price.values()))
    with limited_memory(device):
        result.milliseconds = interleave(timed, QUICK if quick else max(LEAST, min(rounds, MOST)), warm_up=1)
    return result


def beside(result: Result) -> Section:
    """A row with the price of telling the parameters apart."""
    return [["", "per parameter / without", "", "", ratio_text(result.milliseconds, PER_PARAMETER, OBSERVE), *[""] * 4]]


def run(device: str, quick: bool, json: str | None, only: Sequence[str]) -> list[str]:
    """Run the models that `only` chooses, print tables and write the raw samples; returns what failed."""
    record, failures = Record(json, "observe", device), []
    torch.manual_seed(0)

    def report(result: Result) -> None:
        show(HEADER, [section(result) + beside(result)], f"training step with statistics, {device}")

    models = chosen(dict(list(cases(quick, device).items())[:3]), only)  # of the MLP, the ResNet and the GPT
    run_recorded(record, "models", models, partial(bench, device=device, quick=quick), report, failures)
    return failures
