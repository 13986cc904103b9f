"""The choice of learning rates.

First grids of equal length are widened until the best rate is inside of them, and then its neighbours are tried.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..question import Config, Finished

Outcome = dict[str, Any]
Scores = Callable[[Outcome], Sequence[float]]

FACTOR = 2.0  # from one rate of a grid to the next
HALF = math.sqrt(FACTOR)
LIMIT = 24  # rates


def grid(middle: float, rates: int = 5) -> list[float]:
    """So many rates around a middle one, an odd number."""
    return [middle * FACTOR**power for power in range(-(rates // 2), rates // 2 + 1)]


def usual_rates(base: Config) -> list[float]:
    """Of a configuration without `lr`, seven around a rate at which the methods train well on digits.

    With pairwise wrong labels, also three smaller ones, for the same reason as in `search`.
    """
    middle = 0.002 if base["method"] == "AdamW" else 0.05 if base["momentum"] else 0.4
    rates = grid(middle, 7)
    smaller = [rates[0] / FACTOR**power for power in (3, 2, 1)]
    return smaller + rates if base["labels"].startswith("pairwise") else rates


def search(
    finished: Finished, base: Config, rates: Sequence[float], seeds: Sequence[int], scores: Scores
) -> tuple[list[Config], float | None]:
    """The runs of the search, and the rate with the best mean scores, or None before they are finished.

    Where the best rate is the smallest or the largest one, the grid gets another rate beyond it. So it does where the
    smallest one is better than the next: with wrong labels, accuracy may have one maximum among rates so small that
    these are hardly learnt, and another one at the edge of stability.

    Args:
        finished: runs that are finished.
        base: the configuration without `lr` and `seed`.
        rates: the first grid, increasing.
        seeds: each rate is tried with all of them.
        scores: of an outcome; the larger the better. The second one decides between rates with the same first one.

    Raises:
        RuntimeError: if `LIMIT` rates are not enough for that.
    """
    rates = list(rates)
    while True:
        runs, means = scored(finished, base, rates, seeds, scores)
        if not means:
            return runs, None
        best = max(rates, key=means.__getitem__)
        if best not in (rates[0], rates[-1]) and means[rates[0]] <= means[rates[1]]:
            return runs, best
        if len(rates) == LIMIT:
            span = f"{rates[0]:g} to {rates[-1]:g}"
            raise RuntimeError(
                f"the best of {LIMIT} rates from {span}, or of the smallest two, is at the edge, for {base}"
            )
        rates = [*rates, rates[-1] * FACTOR] if best == rates[-1] else [rates[0] / FACTOR, *rates]


def maxima(
    finished: Finished, base: Config, rates: Sequence[float], seeds: Sequence[int], scores: Scores
) -> list[float]:
    """The best rate of a finished grid, which is increasing, and the best other one that is better than its neighbours.

    With two maxima, the grid may come nearer to the lower one than to the higher one.
    """
    _, means = scored(finished, base, rates, seeds, scores)
    best = max(rates, key=means.__getitem__)
    inner = [
        at
        for below, at, above in zip(rates, rates[1:], rates[2:], strict=False)
        if means[at] > max(means[below], means[above])
    ]
    return [best, *sorted(set(inner) - {best}, key=means.__getitem__)[-1:]]


def refine(
    finished: Finished, base: Config, rates: Sequence[float], seeds: Sequence[int], scores: Scores
) -> tuple[list[Config], float | None]:
    """The runs with each of these rates and half a factor below and above it, and the best of all, as in `search`.

    At the edge of stability, accuracies and losses change much within a factor of two, so that the distance of a
    method's edge from the grid would decide on what it seems to gain.
    """
    return best_of(finished, base, [near for at in rates for near in (at, at * HALF**-1, at * HALF)], seeds, scores)


def climb(
    finished: Finished,
    base: Config,
    rate: float,
    tried: Sequence[float],
    seeds: Sequence[int],
    fails: Callable[[Outcome], bool],
) -> tuple[list[Config], list[float] | None]:
    """The runs with a rate and with larger ones, by half a factor each, and those that train, once they are finished.

    A rate trains if no seed fails, and the first one that does not train is the last one that is run.

    Args:
        tried: other rates, which are not run again if only rounding is between them and those on the way.

    Raises:
        RuntimeError: if `LIMIT` rates train.
    """
    runs: list[Config] = []
    trained: list[float] = []
    while len(trained) < LIMIT:
        of_rate = [base | {"lr": rate, "seed": seed} for seed in seeds]
        runs += of_rate
        if any(run not in finished for run in of_rate):
            return runs, None
        if any(fails(finished[run].outcome) for run in of_rate):
            return runs, trained
        trained.append(rate)
        rate = next((other for other in tried if math.isclose(other, HALF * rate)), HALF * rate)
    raise RuntimeError(f"all of {LIMIT} rates from {trained[0]:g} to {trained[-1]:g} train, for {base}")


def best_of(
    finished: Finished, base: Config, rates: Sequence[float], seeds: Sequence[int], scores: Scores
) -> tuple[list[Config], float | None]:
    """The runs with these rates, and the first rate with the best mean scores, or None before they are finished."""
    runs, means = scored(finished, base, rates, seeds, scores)
    return runs, max(rates, key=means.__getitem__) if means else None


def scored(
    finished: Finished, base: Config, rates: Sequence[float], seeds: Sequence[int], scores: Scores
) -> tuple[list[Config], dict[float, tuple[float, ...]]]:
    """The runs with these rates, and the mean scores by rate, or none before they are finished."""
    runs = {lr: [base | {"lr": lr, "seed": seed} for seed in seeds] for lr in rates}
    every = [run for of_rate in runs.values() for run in of_rate]
    if any(run not in finished for run in every):
        return every, {}
    of_rates = {lr: [scores(finished[run].outcome) for run in of_rate] for lr, of_rate in runs.items()}
    return every, {lr: tuple(map(statistics.mean, zip(*each, strict=True))) for lr, each in of_rates.items()}
