"""Choosing the cases of a benchmark by name, and running them one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from .report import reason

T = TypeVar("T")
R = TypeVar("R")


def chosen(cases: dict[str, T], only: Sequence[str]) -> dict[str, T]:
    """The cases whose name contains one of the texts, in the order of the texts; exits if a text is in no name."""
    for text in only:
        if not any(text in name for name in cases):
            sys.exit(f"no case has {text!r} in its name: {'; '.join(cases)}")
    return {name: case for text in only for name, case in cases.items() if text in name}


def run_cases(cases: dict[str, T], bench: Callable[[str, T], R], use: Callable[[R], None], failures: list[str]) -> None:
    """Call `use` with the result of each case. Exceptions are added to `failures`; an interrupt also ends the loop."""
    try:
        for name, case in cases.items():
            try:
                result = bench(name, case)
            except Exception as problem:
                failures.append(f"{name}: {reason(problem)}")
                continue
            use(result)
    except KeyboardInterrupt:
        failures.append("interrupted: the cases that follow are missing")
