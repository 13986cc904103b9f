"""A training step of RGD in 1, 2 and 4 processes against one of SGD with DistributedDataParallel: time and bytes sent.

On the CPU the processes have one thread each and exchange by gloo; on CUDA they have one GPU each and exchange by NCCL,
in as many processes as there are GPUs. The models are those of `steps`. Each process has a fixed part of the batch,
whatever their number: 32 samples of the MLP, 16 of the ResNet, 4 of the GPT and 4 of the WRN.

First, the directions have to be bitwise equal in all processes, and those of the whole batch equal to what one process
finds. Then the arms take turns, and the time of a step is that of the slowest process. Where processes share
processors, ratios mean something, and milliseconds do not. Bytes are those that a process hands to collectives in a
step: of an all-reduce or a broadcast its tensor, of an all-gather its own part. In a ring of R processes, 2 (R - 1) / R
times the bytes of an all-reduce leave each of them.

A simulation predicts the steps of four arms from the times of single layers and all-reduces, which are measured in the
same processes. The predicted order is printed below the measured one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import torch

from .distributing.measurement import measure
from .distributing.processes import run_together
from .distributing.result import HEADER, Result, orders, section
from .measuring.report import Record, show
from .measuring.selection import chosen, run_recorded

# By model, the samples of a process: a quarter of the batch of `steps`, or a sixteenth of the largest model's.
SAMPLES = {
    "MLP 784-1024-1024-10, B = 128": 32,
    "ResNet-GN 0.3M, B = 64": 16,
    "GPT 4 x 256, T = 128, B = 16": 4,
    "WRN-16-4, GN, B = 64": 4,
}
PROCESSES = (1, 2, 4)

Case = tuple[str, int]  # a model and a number of processes


def cases(device: str, quick: bool, only: Sequence[str]) -> dict[str, Case]:
    """Models with R, the number of processes, by name; if quick, the first model with R = 2, or 1 for one GPU."""
    models = chosen(dict([*SAMPLES.items()][:1]) if quick else SAMPLES, only)
    sizes = [size for size in PROCESSES if device == "cpu" or size <= torch.cuda.device_count()]
    sizes = sizes[:2][-1:] if quick else sizes
    return {f"{model}, R = {size}": (model, size) for model in models for size in sizes}


def bench(name: str, case: Case, device: str, quick: bool) -> Result:
    """Agreement, traffic, times and predictions of all arms on one model."""
    model, size = case
    return run_together(measure, size, device, model, SAMPLES[model], quick)


def run(device: str, quick: bool, json: str | None, only: Sequence[str]) -> list[str]:
    """Run the models that `only` chooses, print tables and write the raw samples; returns what failed."""
    torch.set_num_threads(1)  # as in the processes
    record, failures, processors = Record(json, "distributed", device), [], os.cpu_count()
    where = f"one thread each, which share {processors} processors" if device == "cpu" else "one GPU each"

    def report(result: Result) -> None:
        show(HEADER, [section(result)], f"training step, {device}, processes with {where}")
        if result.predicted:
            print(orders(result), flush=True)

    measured = partial(bench, device=device, quick=quick)
    run_recorded(
        record, "models", cases(device, quick, only), measured, report, failures, processors=processors, note=where
    )
    return failures
