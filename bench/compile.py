"""A training step with torch.compile: what it makes of SGD and of a captured model, and the times of both.

A captured model runs uncompiled. For every arm, the graphs and graph breaks of its first step are counted, after a
reset of Dynamo and with an empty cache of Inductor; the time of this step contains the compilation, and for RGD the
verification. Then all arms are started again and take turns. The compiled graphs of a later step are counted as well,
and an arm that should run one and does not is a failure. So is a direction that differs from the uncompiled one, except
in 16-bit models, where the quotient of Rayleigh is mostly rounding.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType

import torch
from torch import Tensor, nn

import rgd_ext

from .measuring.agreement import without_tf32
from .measuring.compilation import Compilation, compiling, graphs_run
from .measuring.report import Record, Section, show
from .measuring.selection import chosen, run_recorded
from .measuring.timing import Samples, host_clock, interleave, ratio_text, synchronize
from .training import oracle
from .training.arms import CONSECUTIVE, Arm, Training, ordinary, repeat, rgd, sgd
from .training.candidates import PEER_TOLERANCE, TOLERANCE
from .training.models import SMALL, Case, cases, loss
from .training.peers import FRACTION, Backward

COMPILATION = ("model", "step", "graphs", "graph breaks", "graphs in a later step", "first step, s", "error")
TIMES = ("model", "step", "median ms", "time / SGD (quartiles)", "time / SGD, compiled", "time / uncompiled")
SGD, SGD_COMPILED, RGD = "SGD", "SGD, compiled", "RGD"
BEFORE, AFTER, LOSS = "RGD, compiled before", "RGD, compiled after", "RGD, compiled loss"
# What runs compiled graphs. A captured model does not.
COMPILED = SGD_COMPILED, LOSS

# Milliseconds for all arms on one model.
TIME = {"cpu": 120_000, "cuda": 4_000}
LEAST, MOST, QUICK = 5, 60, 2  # rounds


@dataclass
class Result:
    """The measurements of one model, by arm.

    Attributes:
        first_step: milliseconds of the first step, with compilation and verification.
        compilation: what was compiled in it.
        graphs_run: the number of compiled graphs in a later step.
        error: differences from the direction of the uncompiled arm.
    """

    model: str
    milliseconds: Samples = field(default_factory=dict)
    first_step: dict[str, float] = field(default_factory=dict)
    compilation: dict[str, Compilation] = field(default_factory=dict)
    graphs_run: dict[str, int] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)


def compiled(model: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """Forward, loss and backward, with the forward compiled."""
    return ordinary(torch.compile(model), x, y)


def compiled_alone(model: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """As `compiled`, in a code object of its own.

    Compiled models share code: that of a wrapper in torch, or that of the forward of their class. The graph break of a
    captured model leaves an entry there with guards that hold for other models, too, which then run uncompiled.
    """

    def forward(x: Tensor) -> Tensor:
        return model(x)

    own = FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
    return ordinary(torch.compile(own), x, y)


def with_compiled_loss(model: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """Forward, loss and backward, with the loss compiled."""
    criterion = torch.compile(loss)

    def backward() -> None:
        criterion(model(x), y).backward()

    return backward


rayleigh = partial(rgd, epsilon=rgd_ext.Rayleigh(FRACTION))
ARMS = {
    SGD: Arm(sgd),
    SGD_COMPILED: Arm(sgd, compiled_alone, same_as=SGD),
    RGD: Arm(rayleigh),
    BEFORE: Arm(rayleigh, same_as=RGD),
    AFTER: Arm(rayleigh, compiled, same_as=RGD),
    LOSS: Arm(rayleigh, with_compiled_loss, same_as=RGD),
}


def training(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Training:
    """An arm on its own copy of the model, which is a compiled one for the arm that captures it so."""
    return Training(ARMS[name], torch.compile(model) if name == BEFORE else model, x, y)


def first_steps(model: nn.Module, x: Tensor, y: Tensor, result: Result) -> None:
    """Compile every arm by itself, and compare the directions; raises AssertionError if one differs."""
    directions, wait = {}, synchronize(x.device.type)
    for name, arm in ARMS.items():
        with without_tf32(), compiling() as result.compilation[name]:
            one = training(name, model, x, y)
            result.first_step[name] = host_clock(one, 1, wait)()
        directions[name] = one.direction()
        if arm.same_as is not None:
            result.error[name] = oracle.relative_error(directions[name], directions[arm.same_as])
    if directions[SGD][0].dtype == torch.float32:
        for name, wrong in result.error.items():
            # Inductor may round inputs of ReLUs to the other side of the kink. A captured model runs as it is.
            if not wrong < (PEER_TOLERANCE if name == SGD_COMPILED else TOLERANCE[x.device.type]["Rayleigh"]):
                raise AssertionError(f"{name}: the direction differs from that of {ARMS[name].same_as} by {wrong:.1e}")


def started(model: nn.Module, x: Tensor, y: Tensor, result: Result) -> dict[str, Training]:
    """The arms beside each other, after their first steps; raises AssertionError if one lacks its compiled graph."""
    torch._dynamo.reset()
    arms = {name: training(name, model, x, y) for name in ARMS}
    for _ in range(2):  # the first step compiles, and leaves gradients, which the second one finds
        for one in arms.values():
            one()
    result.graphs_run = {name: graphs_run(one) for name, one in arms.items()}
    for name in COMPILED:
        if not result.graphs_run[name]:
            raise AssertionError(f"{name}: runs uncompiled")
    return arms


def bench(name: str, case: Case, device: str, quick: bool) -> Result:
    """Compilation, agreement and times of all arms on one model."""
    result = Result(name)
    model, x, y = (part.to(device) for part in case.build())
    first_steps(model, x, y, result)
    arms, wait = started(model, x, y, result), synchronize(device)
    timed = {name: host_clock(partial(repeat, arm), CONSECUTIVE, wait, settle=arm) for name, arm in arms.items()}
    price = sum(host_clock(arm, 1, wait)() for arm in arms.values())
    rounds = QUICK if quick else max(LEAST, min(int(TIME[device] / (1 + CONSECUTIVE) / price), MOST))
    result.milliseconds = interleave(timed, rounds, warm_up=0 if quick else 1)
    return result


def compilation_rows(result: Result) -> Section:
    """Rows of the table of what was compiled."""
    rows = []
    for name, made in result.compilation.items():
        counts = made.graphs, sum(made.breaks.values()), result.graphs_run[name]
        first, error = f"{result.first_step[name] / 1e3:.2f}", result.error.get(name)
        rows.append([name, *map(str, counts), first, "" if error is None else f"{error:.0e}"])
    return with_model(result, rows)


def time_rows(result: Result) -> Section:
    """Rows of the table of times."""
    rows, samples = [], result.milliseconds
    for name in samples:
        others = SGD, SGD_COMPILED if name != SGD else SGD, ARMS[name].same_as or name
        ratios = [ratio_text(samples, name, other) for other in others]
        rows.append([name, f"{statistics.median(samples[name]):.2f}", *ratios])
    return with_model(result, rows)


def with_model(result: Result, rows: Section) -> Section:
    """The rows, the first one with the name of the model."""
    return [["" if index else result.model, *row] for index, row in enumerate(rows)]


def models(quick: bool, device: str) -> dict[str, Case]:
    """The models by name: the MLP, the ResNet and the GPT, and on CUDA also a larger MLP and a GPT in bfloat16."""
    found = cases(quick, device)
    if quick:
        return found
    large = ("MLP 784-2048-2048-10, B = 256", "GPT-2 small's shape, bfloat16, B = 8") if device == "cuda" else ()
    return {name: case for name, case in found.items() if name in (*SMALL, *large)}


def run(device: str, quick: bool, json: str | None, only: Sequence[str]) -> list[str]:
    """Run the models that `only` chooses, print tables and write the raw samples; returns what failed."""
    record, failures = Record(json, "compile", device), []
    torch.manual_seed(0)

    def report(result: Result) -> None:
        show(COMPILATION, [compilation_rows(result)], f"torch.compile in the first training step, {device}")
        show(TIMES, [time_rows(result)], f"training step with torch.compile, {device}")
        for name, made in result.compilation.items():
            for why, count in made.breaks.items():
                print(f"{result.model}, {name}: {count} x {why}", flush=True)

    found = chosen(models(quick, device), only)
    torch.compile(torch.sin)(torch.ones(1, device=device))  # imports the compiler, which is no part of a first step
    run_recorded(record, "models", found, partial(bench, device=device, quick=quick), report, failures)
    return failures
