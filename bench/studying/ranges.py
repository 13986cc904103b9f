"""The least and the largest of numbers over settings, for the text of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .question import slug


def ranges(
    values: Iterable[tuple[tuple[Any, ...], float]], shortest: int, text: Callable[[float], str] = "{:.2f}".format
) -> dict[str, str]:
    """The least and the largest of all values whose keys begin alike, by the beginning, such as cosine.600.least.

    Args:
        values: with their keys.
        shortest: how long a beginning is at least; the longest one is the whole key.
        text: of a value.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for key, value in values:
        for length in range(shortest, len(key) + 1):
            groups.setdefault(key[:length], []).append(value)
    least = {slug(*key, "least"): text(min(group)) for key, group in groups.items()}
    return least | {slug(*key, "largest"): text(max(group)) for key, group in groups.items()}
