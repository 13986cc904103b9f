"""How fast methods of least squares fit functions: `GaussNewton`, Adam, SGD, L-BFGS, and another package.

All networks are MLPs with tanh in float64, on one thread. Each method runs for the same time from the same weights. The
methods take turns on a problem, and the evaluation of errors does not count. Where a method has several settings, the
best one after a run on other weights is taken; a rate that decays falls to zero along a cosine of the time. Errors are
mean squared residuals over all samples; where the solution is known, its root mean square error at fresh points is
printed as well. A second table compares the cost of a Gauss-Newton step with that of an SGD step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

from .fitting import equations, problems, step_cost
from .fitting.methods import ON_ALL, ON_SAMPLES, PEER, Method
from .fitting.result import HEADER, Result, draw, section
from .fitting.runs import Budget, compare
from .measuring.report import Record, show
from .measuring.selection import chosen, run_recorded

Case = tuple[Callable[[], problems.Problem], dict[str, Method]]
# By name: a function that makes the problem, and the methods.
PROBLEMS: dict[str, Case] = {
    "1-D function": (problems.one_dimension, ON_ALL),
    "2-D function": (problems.two_dimensions, ON_ALL),
    "diabetes (noisy)": (problems.diabetes, ON_ALL),
    "autoencoder": (problems.autoencoder, ON_SAMPLES),
    "Poisson": (equations.poisson, ON_ALL),
    "heat": (equations.heat, ON_ALL),
}
FULL, QUICK = Budget(seconds=5, seeds=5, turns=40), Budget(seconds=0.05, seeds=1, turns=3)
ROUNDS, QUICK_ROUNDS = 200, 5  # of the cost of a step


def bench(name: str, case: Case, device: str, quick: bool, budget: Budget) -> Result:
    """The runs of all methods on a problem, without the other package if it is to be quick."""
    build, methods = case
    methods = {each: method for each, method in methods.items() if not (quick and each == PEER)}
    torch.manual_seed(0)
    with torch.device(device):
        problem = build()
    return compare(name, problem, methods, budget)


def run(
    device: str, quick: bool, json: str | None, plot: str | None, only: Sequence[str], seconds: float | None
) -> list[str]:
    """Run what `only` chooses, print tables, write the curves and a plot; returns what failed."""
    torch.set_num_threads(1)
    record, failures = Record(json, "fit", device), []
    budget, rounds = (QUICK, QUICK_ROUNDS) if quick else (FULL, ROUNDS)
    budget = budget if seconds is None else replace(budget, seconds=seconds)
    wanted = chosen(PROBLEMS | step_cost.CASES, only)
    models = {name: case for name, case in wanted.items() if name in step_cost.CASES}
    fits = {name: case for name, case in wanted.items() if name in PROBLEMS}

    def report_cost(cost: step_cost.Cost) -> None:
        show(step_cost.HEADER, [step_cost.section(cost)], f"a step on one batch in float64, {device}")

    def report(result: Result) -> None:
        title = f"least squares, median of {budget.seeds} runs of {budget.seconds:g} seconds, {device}"
        show(HEADER, [section(result)], title)

    measure = partial(step_cost.measure, device=device, rounds=rounds)
    costs = [asdict(cost) for cost in run_recorded(record, "steps", models, measure, report_cost, failures)]
    measure = partial(bench, device=device, quick=quick, budget=budget)
    results = run_recorded(record, "problems", fits, measure, report, failures, steps=costs, budget=asdict(budget))
    if plot and results:
        draw(results, plot)
    return failures
