"""One attempt: a package on a case, and how far its result is from plain autograd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..measuring.report import reason
from .cases import Case
from .packages.found import AbsentError, Found, Package
from .problem import Problem
from .reference import SAMPLES, error, expected, rows_by_meaning

EXACT, OTHER, WRONG, REFUSED, ABSENT = "exact", "other", "wrong", "refused", "absent"


LONGEST = 200  # characters of a warning
# How warnings begin that are about hooks and tracing.
NOISE = (
    "Full backward hook is firing",
    "For backward hooks to be called",
    "There is a performance drop",
    "`torch.jit",
    "Encountered node that may break second-order",
)

# Of BackPACK; it is said of modules that only hold others as well.
UNKNOWN = "does not have an extension for Module"


@dataclass
class Attempt:
    """What one way to use a package gives.

    Attributes:
        outcome: exact; other, if the rows have another meaning; wrong; refused, with an error; or absent.
        error: relative, of the worst result.
        meaning: of the rows, where it is another one; or what became of the model, where it should be kept.
        about: the error that was raised, in one line.
        warned: the first line of the first warning, if there was one.
        another_model: whether the package has replaced the model by one with other outputs.
    """

    outcome: str
    error: float | None = None
    meaning: str = ""
    about: str = ""
    warned: str = ""
    another_model: bool = False


@dataclass
class Result:
    """All attempts on a case, by package and way; and what the table says of those that succeed."""

    case: str
    success: str
    attempts: dict[str, dict[str, Attempt]] = field(default_factory=dict)


def attempt(case: Case, way: Callable[[Problem], Found]) -> Attempt:
    """Use a package in one way on a fresh copy of the problem."""
    with case.dtype(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        problem = case.problem()
        try:
            found = way(case.given(problem))
        except AbsentError as absence:
            return Attempt(ABSENT, about=str(absence))
        except Exception as refusal:
            return Attempt(REFUSED, about=reason(refusal), warned=first_line(warned))
        told = first_line(warned)
        result = judge(problem, found, case)
    result.warned = told
    changed = difference(problem.model, found.model)
    if case.kept and changed:
        result.outcome, result.meaning = OTHER, changed
    return result


def difference(before: nn.Module, after: nn.Module) -> str:
    """The type of a model, or the first name in its `state_dict`, if that is not what it was; else nothing."""
    names = list(after.state_dict())
    if names != list(before.state_dict()):
        return names[0]
    return "" if type(after) is type(before) else type(after).__name__


def first_line(warned: list[warnings.WarningMessage]) -> str:
    """Of the first warning that is about the result."""
    texts = (str(one.message).strip().partition("\n")[0] for one in warned)
    told = (text for text in texts if not text.startswith(NOISE) and not (UNKNOWN in text and "torch.nn" not in text))
    return next(told, "")[:LONGEST]


def judge(problem: Problem, found: Found, case: Case) -> Attempt:
    """Compare the results with plain autograd."""
    another = False
    if found.instead is not None:
        output = problem.model(problem.x)
        problem = replace(problem, model=found.instead)
        another = not torch.allclose(problem.model(problem.x), output)
    plain = replace(problem, autocast=False)
    errors = {}
    for meaning, rows in rows_by_meaning(plain, case.mixes and not another).items():
        errors[meaning] = max(error(got, expected(kind, rows, plain)) for kind, got in found.results.items())
    meaning = next((meaning for meaning, wrong in errors.items() if wrong < case.tolerance), None)
    if meaning is None:
        wrong = errors[SAMPLES]
        return Attempt(WRONG, wrong if math.isfinite(wrong) else None, another_model=another)
    outcome = EXACT if meaning == SAMPLES else OTHER
    return Attempt(outcome, errors[meaning], meaning, another_model=another)


def tried(name: str, case: Case, packages: dict[str, Package]) -> Result:
    """All packages on a case. The other ways of a package are tried where the first one is not exact."""
    result = Result(name, case.success)
    for package, about in packages.items():
        attempts = result.attempts[package] = {}
        for way, function in about.ways.items():
            attempts[way] = attempt(case, function)
            if attempts[way].outcome == EXACT:
                break
    return result
