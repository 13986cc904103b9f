"""Choosing the cases of a benchmark by name, running them one after the other, and recording their results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from .report import Record, reason

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


def run_recorded(
    record: Record,
    key: str,
    cases: dict[str, T],
    bench: Callable[[str, T], R],
    report: Callable[[R], None],
    failures: list[str],
    **others: object,
) -> list[R]:
    """`run_cases`, with a record of all results, which are dataclasses.

    Args:
        record: is written after each case, so that the results so far are kept if the run is interrupted.
        key: the name of the results in the record.
        cases, bench: of `run_cases`.
        report: is called with each result, and may add to `failures`.
        failures: of `run_cases`; it is recorded, too.
        others: what else is recorded.

    Returns:
        The results.
    """
    results: list[R] = []

    def save() -> None:
        record.write(**others, failures=failures, **{key: [asdict(result) for result in results]})

    def use(result: R) -> None:
        results.append(result)
        report(result)
        save()

    run_cases(cases, bench, use, failures)
    save()
    return results
