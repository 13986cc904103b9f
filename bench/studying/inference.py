"""Means over seeds and paired differences, with bootstrap intervals, and a correction for many comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
from scipy.stats import bootstrap, permutation_test

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A mean, and the interval in which it lies with a confidence of 95 %."""

    mean: float
    low: float
    high: float

    def text(self, number: Callable[[float], str] = "{:.2f}".format) -> str:
        """The mean, and in brackets the ends, each as `number` writes it."""
        middle, low, high = map(number, (self.mean, self.low, self.high))
        return f"{middle} ({low} to {high})"

    def exp(self) -> Interval:
        """That of a geometric mean, if this one is of logarithms."""
        return Interval(exp(self.mean), exp(self.low), exp(self.high))


def mean(values: Sequence[float]) -> Interval:
    """The mean over seeds, with the interval of a bias-corrected and accelerated bootstrap (Efron, 1987)."""
    sample = np.asarray(values, dtype=float)
    if np.ptp(sample) == 0:  # one seed, or seeds that agree: the bootstrap has nothing to resample
        return Interval(*[float(sample[0])] * 3)
    found = bootstrap(
        (sample,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    return Interval(float(sample.mean()), *map(float, found.confidence_interval))


def differences(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """The values less those of the baseline with the same seeds.

    Raises:
        ValueError: if there are more of one than of the other.
    """
    return [value - other for value, other in zip(values, baseline, strict=True)]


def p_value(paired: Sequence[float]) -> float:
    """Of the paired differences, if they are as likely positive as negative: the exact sign-flip test, two-sided.

    With n seeds it is at least 2^(1 - n), so that a single one says nothing.
    """
    if len(paired) == 1:
        return 1.0
    sample = np.asarray(paired, dtype=float)
    return float(permutation_test((sample,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of comparisons, corrected for their number (Holm, 1979)."""
    order = np.argsort(p_values, kind="stable")
    count = len(p_values)
    corrected = np.maximum.accumulate([(count - rank) * p_values[at] for rank, at in enumerate(order)])
    found = np.empty(count)
    found[order] = np.minimum(corrected, 1)
    return found.tolist()


@dataclass(frozen=True)
class Comparison:
    """The mean of paired differences from a baseline, its interval, and its p-value, corrected for the family."""

    difference: Interval
    p: float

    @property
    def significant(self) -> bool:
        return self.p < 1 - CONFIDENCE


def against(baseline: Sequence[float], family: Mapping[str, Sequence[float]]) -> dict[str, Comparison]:
    """Each of a family compared with the baseline, by seeds, with Holm's correction for their number."""
    paired = {name: differences(values, baseline) for name, values in family.items()}
    corrected = holm([p_value(each) for each in paired.values()])
    return {name: Comparison(mean(each), p) for (name, each), p in zip(paired.items(), corrected, strict=True)}
