"""The operators on materialised per-sample gradients against plain PyTorch, torch.compile and reading G.

Every arm is first compared with float64. An arm that does not agree is left out, and it is a failure if it is ours.
Eager and read are the fastest of several ways (bench/gradients/arms.py), chosen by a first pass. On CUDA, times are
those of a graph replay on cold buffers, except in the row launched from Python. GB/s counts the bytes that the fused
operator moves.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from functools import partial

import torch

import rgd_ext

from .gradients.arms import TWO_READS, Arm, arms, why_no_compile
from .gradients.cases import Buffer, Case, cases, fill
from .gradients.reference import exact
from .gradients.result import HEADER, Result, progress, section
from .gradients.roofline import draw
from .measuring import cuda_timing
from .measuring.agreement import error
from .measuring.inputs import dtype_name
from .measuring.memory import extra_memory
from .measuring.report import Record, reason, show
from .measuring.selection import chosen, run_recorded
from .measuring.timing import Clock, call_each, fastest, host_clock, interleave

LAUNCHED = "precondition, launched from Python"
CPU_BYTES = 2**31
QUICK_BYTES = 2**26
CEILING_BYTES = 2**32
MILLISECONDS = 10_000  # per case; slow cases have fewer rounds, but at least five


def grads_of(arm: Arm, buffer: Buffer) -> list[torch.Tensor]:
    return buffer.flat if arm.flat else buffer.tensors


def agreeing(ways: dict[str, Arm], buffer: Buffer, epsilon: torch.Tensor, result: Result) -> dict[str, Arm]:
    """The arms that run and agree with float64. Notes errors, memory and why others are left out in `result`."""
    want = {flat: exact(buffer.flat if flat else buffer.tensors, epsilon) for flat in {a.flat for a in ways.values()}}
    kept = {}
    for name, arm in ways.items():
        grads = grads_of(arm, buffer)
        try:
            got = arm.call(grads)
            if arm.kind != "read":
                wrong = result.error[name] = error(got, want[arm.flat][arm.kind])
                if not wrong < arm.tolerance:
                    result.leave_out(name, f"differs from float64 by {wrong:.1e} of its largest value", arm.ours)
                    continue
            del got
            if epsilon.is_cuda:
                result.extra_memory[name] = extra_memory(lambda arm=arm, grads=grads: arm.call(grads), "cuda")
        except Exception as problem:
            result.leave_out(name, reason(problem), arm.ours)
            continue
        kept[name] = arm
    return kept


def clocks_of(ways: dict[str, Arm], buffers: list[Buffer], device: str, result: Result) -> dict[str, Clock]:
    """A clock for each arm, and on CUDA one for calls of `precondition` from Python."""
    found, timer = {}, cuda_timing.timer(device)
    for name, arm in ways.items():
        inputs = [grads_of(arm, buffer) for buffer in buffers]
        found[name], problem = timer(arm.call, inputs)
        if problem is not None:
            result.leave_out(f"{name} as a graph", reason(problem), arm.ours)
        if name == "precondition" and device == "cuda":
            found[LAUNCHED] = host_clock(partial(call_each, arm.call, inputs), len(inputs), torch.cuda.synchronize)
    return found


def bench(case: Case, device: str, rounds: int, no_compile: str | None) -> Result:
    """Agreement and times of all arms on one case."""
    copies = cuda_timing.number_of_buffers(case.bytes, device)
    dtype = dtype_name(case.dtype)
    result = Result(case.name, case.batch_size, len(case.sizes), case.weights, dtype, case.bytes, copies)
    buffers = [fill(case, device) for _ in range(copies)]
    # The direction then differs from the mean by about the size of the mean.
    epsilon = torch.full((), 3 / case.weights**0.5, device=device)
    if no_compile:
        result.leave_out("compile", no_compile)
    torch._dynamo.reset()  # otherwise torch.compile gives up after a few cases
    ways = agreeing(arms(case, epsilon, not no_compile), buffers[0], epsilon, result)

    moved = {
        "direction": 2 * case.bytes + case.weights * case.dtype.itemsize,
        "read": 2 * case.bytes,
        "moments": case.bytes + case.weights * case.dtype.itemsize,
        "gram": case.bytes + 4 * case.batch_size**2,
    }
    timed = clocks_of(ways, buffers, device, result)
    first = interleave(timed, rounds=3, warm_up=1)
    for role in ("eager", "read"):
        names = [name for name in timed if name.startswith(f"{role}:")]
        for name in names:
            if name != fastest(first, names):
                del timed[name]
    one_round = sum(statistics.median(first[name]) for name in timed)
    result.milliseconds = interleave(timed, max(5, min(rounds, int(MILLISECONDS / one_round))))
    result.bytes_moved = {name: moved[ways[name].kind if name in ways else "direction"] for name in timed}
    return result


def ceilings(size: int, device: str, rounds: int) -> dict[str, object]:
    """Measured bandwidths of reading `size` bytes, and on CUDA of copying them (bytes read plus bytes written)."""
    grads = fill(Case("ceiling", 16, [size // 64], torch.float32), device).flat[0]
    reads = {name: lambda f=read: f(grads) for name, read in TWO_READS.items()}
    clock = (lambda run: cuda_timing.device_clock(run, 1)) if device == "cuda" else host_clock
    timed = {name: clock(read) for name, read in reads.items()}
    if device == "cuda":
        timed["copy"] = cuda_timing.copy_clock(size)
    samples = interleave(timed, rounds)
    read = fastest(samples, list(reads))
    found = {"bytes": size, "read": 2 * size / statistics.median(samples[read]) / 1e6, "read by": read}
    if device == "cuda":
        found["copy"] = 2 * size / statistics.median(samples["copy"]) / 1e6
    return found | {"milliseconds": samples}


def run(
    device: str, quick: bool, json: str | None, plot: str | None, only: Sequence[str], no_compile: bool
) -> list[str]:
    """Run the cases that `only` chooses, print a table, write raw samples and a plot; returns what failed."""
    on_cuda, record = device == "cuda", Record(json, "kernels", device)
    rounds = 5 if quick else 30 if on_cuda else 15
    max_bytes = torch.cuda.get_device_properties().total_memory // 4 if on_cuda else CPU_BYTES
    max_bytes = QUICK_BYTES if quick else max_bytes
    torch.manual_seed(0)
    wanted = chosen({case.name: case for case in cases(max_bytes, quick)}, only)
    found = ceilings(min(max_bytes // 2, CEILING_BYTES), device, rounds)
    failures = []
    if on_cuda and not rgd_ext.build_info()["cuda"]:
        failures.append("rgd_ext is built without CUDA: what is called fused here is plain PyTorch")

    def measured(_: str, case: Case) -> Result:
        why = "left out by --no-compile" if no_compile else why_no_compile(case, device, quick)
        return bench(case, device, rounds, why)

    def report(result: Result) -> None:
        failures.extend(result.failures)
        progress(result)
        gc.collect()

    results = run_recorded(record, "cases", wanted, measured, report, failures, ceilings=found)
    show(HEADER, [section(result) for result in results], f"kernels, {device}")
    print({name: value for name, value in found.items() if name != "milliseconds"})
    if plot and results:
        draw(results, found, plot)
    return failures
