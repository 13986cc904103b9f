"""The choice of the cases that a benchmark runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def chosen(cases: dict[str, T], only: Sequence[str]) -> dict[str, T]:
    """The cases whose name contains one of the texts, in the order of the texts; exits if a text is in no name."""
    for text in only:
        if not any(text in name for name in cases):
            sys.exit(f"no case has {text!r} in its name: {'; '.join(cases)}")
    return {name: case for text in only for name, case in cases.items() if text in name}
