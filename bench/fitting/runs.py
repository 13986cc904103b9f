"""Runs of methods on a problem, each for the same time and from the same weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..measuring.report import reason
from ..measuring.timing import synchronize
from .methods import OURS, Method, Setting, Step, as_text
from .problems import Problem
from .result import Curve, Result

Start = Callable[[Problem, nn.Module], Step]

# Of the weights on which settings are compared. The runs that are reported have the seeds 0, 1, ...
TUNING_SEED = 1000
# The share of the time that the first turn takes.
FIRST = 0.005


@dataclass(frozen=True)
class Budget:
    """Seconds for each run, the number of runs of each method, and of turns in a run, which grow in length."""

    seconds: float
    seeds: int
    turns: int

    def shares(self) -> list[float]:
        """The share of the time that has passed after each turn."""
        return [FIRST ** (1 - turn / (self.turns - 1)) for turn in range(self.turns)]


class Run:
    """A method on a model, whose error is noted at the start and after each turn. That does not count as its time."""

    def __init__(self, start: Start, problem: Problem, model: nn.Module, seconds: float) -> None:
        self._problem, self._model, self._seconds = problem, model, seconds
        self._wait = synchronize(next(model.parameters()).device.type)
        self._step = start(problem, model)
        self._steps, self._passed, self.curve = 0, 0.0, Curve()
        self._note()

    def advance(self, share: float) -> None:
        """Make steps until `share` of the time has passed. A step that has begun is finished."""
        while self._passed < share * self._seconds:
            begin = time.perf_counter()
            self._steps += self._step(self._passed / self._seconds)
            self._wait()
            self._passed += time.perf_counter() - begin
        self._note()

    def _note(self) -> None:
        self.curve.steps.append(self._steps)
        self.curve.seconds.append(_rounded(self._passed))
        self.curve.error.append(_rounded(self._problem.error(self._model)))
        if self._problem.solution_error:
            self.curve.solution_error.append(_rounded(self._problem.solution_error(self._model)))


def _rounded(x: float) -> float:
    """With as many digits as a curve shows, since there are tens of thousands of numbers."""
    return float(f"{x:.4g}")


def race(
    problem: Problem, starts: dict[str, Start], seed: int, budget: Budget, failed: dict[str, str]
) -> dict[str, Curve]:
    """The curves of methods that take turns, so that a disturbance of the machine affects all of them.

    What raises is noted in `failed`, and has no curve.
    """
    torch.manual_seed(seed)
    network = problem.network()
    runs: dict[str, Run] = {}
    for share in budget.shares():
        for name, start in starts.items():
            if name in failed:
                continue
            try:
                if name not in runs:
                    runs[name] = Run(start, problem, copy.deepcopy(network), budget.seconds)
                runs[name].advance(share)
            except Exception as exception:
                failed[name] = reason(exception)
    return {name: run.curve for name, run in runs.items() if name not in failed}


def best_setting(name: str, method: Method, problem: Problem, budget: Budget, result: Result) -> Setting | None:
    """The setting with the smallest error at the end, from other weights than those of the runs; None if all fail.

    The errors, or why there are none, are noted in `result`.
    """
    if len(method.settings) == 1:
        return method.settings[0]
    settings = {as_text(setting): setting for setting in method.settings}
    failed: dict[str, str] = {}
    starts = {text: partial(method.start, **setting) for text, setting in settings.items()}
    curves = race(problem, starts, TUNING_SEED, budget, failed)
    if not curves:
        result.left_out[name] = next(iter(failed.values()))
        return None
    errors = result.tuning[name] = {text: curve.error[-1] for text, curve in curves.items()}
    return settings[min(errors, key=errors.__getitem__)]


def compare(name: str, problem: Problem, methods: dict[str, Method], budget: Budget) -> Result:
    """The curves of all methods on a problem, from the same weights for each seed; raises if one of ours fails."""
    result, starts = Result(name), {}
    for each, method in methods.items():
        setting = best_setting(each, method, problem, budget, result)
        if setting is not None:
            starts[each], result.settings[each] = partial(method.start, **setting), as_text(setting)
    for seed in range(budget.seeds):
        for each, curve in race(problem, starts, seed, budget, result.left_out).items():
            result.curves.setdefault(each, []).append(curve)
    for each, why in result.left_out.items():
        result.curves.pop(each, None)
        if each.startswith(OURS):
            raise AssertionError(f"{each}: {why}")
    return result
