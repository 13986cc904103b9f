"""Ratios to a baseline, from comparisons of logarithms."""

from __future__ import annotations

from ..inference import Comparison, Interval


def ratio_to_baseline(comparison: Comparison) -> Interval:
    """The ratio of geometric means."""
    return comparison.difference.exp()


def ratio_text(comparison: Comparison) -> str:
    """A ratio with its interval, and a star where it differs from 1 after Holm's correction."""
    return interval_text(ratio_to_baseline(comparison)) + " *" * comparison.significant


def interval_text(ratio: Interval) -> str:
    """A ratio with its interval."""
    return ratio.text(short)


def short(ratio: float) -> str:
    """Two decimals, or one significant digit where that is more."""
    return f"{ratio:.2f}" if ratio > 0.1 else f"{ratio:.1g}"
