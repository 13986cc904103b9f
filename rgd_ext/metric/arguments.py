"""Checks of what policies and rules are made with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

# What a policy or a rule reads of the statistics: the Gramian and the eigenvalues, or only what needs no Gramian.
Need: TypeAlias = Literal["alignments", "norms", "gram"]
NEEDS: tuple[Need, ...] = get_args(Need)
# How several processes find lambda_max of the union of their batches.
EigenvalueMethod: TypeAlias = Literal["lanczos", "bound"]
EIGENVALUE_METHODS: tuple[EigenvalueMethod, ...] = get_args(EigenvalueMethod)
# What a loss is multiplied by before its backward, or a function that returns it.
LossScale: TypeAlias = float | Callable[[], float]


def check_finite(owner: str, name: str, value: float) -> None:
    """Raise unless `value`, the argument `name` of `owner`, is a finite number."""
    if isinstance(value, bool):
        raise TypeError(f"{owner}({name}={value!r}): pass a number")
    try:
        is_finite = math.isfinite(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{owner}({name}={value!r}): pass a number") from error
    except OverflowError as error:
        raise ValueError(f"{owner}({name}=...): pass a number that a float can hold") from error
    if not is_finite:
        raise ValueError(f"{owner}({name}={value}): pass a finite number")


def check_positive(owner: str, name: str, value: float, remedy: str = "pass a positive number") -> None:
    """Raise unless `value`, the argument `name` of `owner`, is a finite number above zero."""
    check_finite(owner, name, value)
    if value <= 0:
        raise ValueError(f"{owner}({name}={value}): {remedy}")


def check_scale(owner: str, loss_scale: LossScale) -> None:
    """Raise unless `loss_scale`, an argument of `owner`, is a positive number or a function."""
    if not callable(loss_scale):
        current_scale(owner, loss_scale)


def current_scale(owner: str, loss_scale: LossScale) -> float:
    """The scale of the loss now; ValueError unless it is positive."""
    scale = loss_scale() if callable(loss_scale) else loss_scale
    check_positive(owner, "loss_scale", scale, "pass a positive number, or a function that returns one")
    return scale


def is_of_torchjd(function: object, name: str) -> bool:
    """Whether `function` inherits from the class of that name in torchjd.aggregation, which need not be installed."""
    bases = type(function).__mro__
    return any(base.__module__.startswith("torchjd.aggregation") and base.__name__ == name for base in bases)


def checked_need(function: object) -> Need:
    """What a callable says that it needs, by its attribute `needs`; the Gramian if it says nothing."""
    needs = getattr(function, "needs", "gram")
    if needs not in NEEDS:
        raise ValueError(f"{function!r} has needs = {needs!r}: choose {', '.join(map(repr, NEEDS))}")
    return needs
