"""A training step along TorchJD's UPGrad, one objective for each sample: by our capture and by TorchJD's engines.

All arms take the weights from the B x B Gramian by the same rule, whose own time is a column of the table. Ours has it
as `weights` of the capture, with an ordinary backward of the mean loss. TorchJD's autogram computes the Gramian in one
backward and the direction in another; its autojac computes all per-sample gradients. First, every direction is compared
with that of explicit gradients in float64. The rule amplifies the rounding errors of the Gramians, so that in float32
the directions differ from each other by more than ordinary gradients do. Memory is the peak of two steps, and every
timed step follows another one of the same arm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from rgd_ext.weights import FromGramian

from .measuring.agreement import without_tf32
from .measuring.memory import limited_memory
from .measuring.report import Record, Section, show
from .measuring.selection import chosen, run_recorded
from .measuring.timing import host_clock, interleave, ratio_text, synchronize
from .training import oracle, peers
from .training.arms import OURS, Arm, Training, rgd, sgd
from .training.candidates import TOLERANCE, candidates
from .training.models import Case, cases
from .training.result import REASON_WIDTH, Result

HEADER = (
    "model",
    "step",
    "median ms",
    "time / SGD (quartiles)",
    "time / ours (quartiles)",
    "rule ms",
    "peak / SGD",
    "from ours",
    "from float64",
)
UPGRAD, AUTOGRAM, AUTOJAC, RULE = "UPGrad, ours", "autogram", "autojac", "rule"

# TorchJD's Gramians have larger rounding errors than ours, so its directions may be so many times as far from float64.
THEIR_TOLERANCE = 10
# Milliseconds for the arms of ours on one model, and for each of TorchJD's.
OUR_TIME, THEIR_TIME = 10_000, 20_000
LEAST, MOST, QUICK = 3, 40, 2  # rounds

Rule = Callable[[Tensor], Tensor]


@dataclass
class Comparison(Result):
    """The measurements of one model. `error` has the differences from our direction, by arm.

    Attributes:
        from_float64: the differences from the direction in float64, by arm.
    """

    from_float64: dict[str, float] = field(default_factory=dict)


def upgrad_arms() -> tuple[dict[str, Arm], Rule]:
    """The arms by name, and their rule; raises ImportError without TorchJD or its solver."""
    from torchjd.aggregation import UPGrad, UPGradWeighting

    rule = UPGradWeighting()
    arms = {
        "SGD": OURS["SGD"],
        "RGD Spectral": OURS["RGD Spectral"],
        UPGRAD: Arm(partial(rgd, weights=FromGramian(rule))),
        AUTOGRAM: Arm(sgd, partial(peers.torchjd, weighting=rule), UPGRAD),
        AUTOJAC: Arm(sgd, partial(peers.torchjd_autojac, aggregator=UPGrad()), UPGRAD),
    }
    return arms, rule


def direction_in_float64(model: nn.Module, x: Tensor, y: Tensor, rule: Rule) -> list[Tensor]:
    """sum_i w_i g_i by explicit gradients g_i, with the weights that the rule gives for their Gramian."""
    with oracle.Sides() as sides:
        model(x)
    grads = oracle.per_sample_grads(model, x, y, sides)
    weights = rule(sum(rows @ rows.T for rows in (grad.flatten(1) for grad in grads)))
    return [torch.tensordot(weights, grad, 1) for grad in grads]


def compare(model: nn.Module, x: Tensor, y: Tensor, arms: dict[str, Arm], rule: Rule, result: Comparison) -> None:
    """Compare the directions of UPGrad with float64; raises AssertionError if one differs by too much."""
    with without_tf32():
        wanted = direction_in_float64(model, x, y, rule)
        for name, factor in {UPGRAD: 1, AUTOGRAM: THEIR_TOLERANCE, AUTOJAC: THEIR_TOLERANCE}.items():
            training = Training(arms[name], model, x, y)
            training()
            wrong = result.from_float64[name] = oracle.relative_error(training.direction(), wanted)
            if not wrong < factor * TOLERANCE[x.device.type]["Spectral"]:
                raise AssertionError(f"{name}: the direction differs from float64 by {wrong:.1e}")


def bench(name: str, case: Case, device: str, quick: bool) -> Comparison:
    """Agreement, memory and times of all arms on one model."""
    arms, rule = upgrad_arms()
    result = Comparison(name)
    model, x, y = (part.to(device) for part in case.build())
    with limited_memory(device):
        compare(model, x, y, arms, rule, result)
    # Quick, so that the peers of `steps` are not among them.
    trainings, price = candidates(model, x, y, quick=True, result=result, ours=arms)

    wait, gram = synchronize(device), trainings[UPGRAD].optimizer.preconditioner.stats.gram
    timed = {name: host_clock(training, 1, wait, settle=training) for name, training in trainings.items()}
    timed[RULE] = host_clock(partial(rule, gram), 1, wait)
    theirs = [name for name in (AUTOGRAM, AUTOJAC) if name in trainings]
    ours = sum(time for name, time in price.items() if name not in theirs)
    rounds = QUICK if quick else max(LEAST, min(int(OUR_TIME / 2 / ours), MOST))
    counts = {name: 1 if quick else max(LEAST, int(THEIR_TIME / 2 / price[name])) for name in theirs}
    with limited_memory(device):
        result.milliseconds = interleave(timed, rounds, warm_up=0, counts=counts)
    return result


def section(result: Comparison) -> Section:
    """Rows of a table. Times and memory are compared with those of SGD, and TorchJD's times with ours."""
    rows, times = [], result.milliseconds
    for name in (arm for arm in times if arm != RULE):
        by_rule = f"{statistics.median(times[RULE]):.2f}" if name == UPGRAD else ""
        beside = ratio_text(times, name, UPGRAD) if name in (AUTOGRAM, AUTOJAC) else ""
        time = f"{statistics.median(times[name]):.2f}", ratio_text(times, name, "SGD"), beside, by_rule
        memory = f"{result.peak_bytes[name] / result.peak_bytes['SGD']:.2f}"
        errors = [f"{found[name]:.1e}" if name in found else "" for found in (result.error, result.from_float64)]
        rows.append(["" if rows else result.model, name, *time, memory, *errors])
    return rows + [["", name, "left out", why[:REASON_WIDTH], *[""] * 5] for name, why in result.left_out.items()]


def run(device: str, quick: bool, json: str | None, only: Sequence[str]) -> list[str]:
    """Run the models that `only` chooses, print tables and write the raw samples; returns what failed."""
    record, failures = Record(json, "torchjd", device), []
    torch.manual_seed(0)

    def report(result: Comparison) -> None:
        show(HEADER, [section(result)], f"training step along UPGrad, {device}")

    models = chosen(dict(list(cases(quick).items())[:3]), only)  # of the MLP, the ResNet and the GPT
    run_recorded(record, "models", models, partial(bench, device=device, quick=quick), report, failures)
    return failures
