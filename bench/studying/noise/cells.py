"""Numbers and intervals as the tables and the text of question 6 show them."""

from __future__ import annotations

from ..inference import Interval


def text(interval: Interval) -> str:
    """With two significant digits."""
    return interval.text(short)


def short(value: float) -> str:
    """Two significant digits, or all of them before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
