"""The choice of learning rates: first grids of equal length, widened until the best rate is inside of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..question import Config, Finished

FACTOR = 2.0  # from one rate of a grid to the next
LIMIT = 24  # rates


def grid(middle: float, rates: int = 5) -> list[float]:
    """So many rates around a middle one, an odd number."""
    return [middle * FACTOR**power for power in range(-(rates // 2), rates // 2 + 1)]


def usual_rates(base: Config) -> list[float]:
    """Of a configuration without `lr`, around rates at which the methods train well on digits."""
    if base["method"] == "AdamW":
        return grid(0.002, 7)
    return grid(0.05 if base["momentum"] else 0.4, 7)


def search(
    finished: Finished,
    base: Config,
    rates: Sequence[float],
    seeds: Sequence[int],
    scores: Callable[[dict[str, Any]], Sequence[float]],
) -> tuple[list[Config], float | None]:
    """The runs of the search, and the rate with the best mean scores, or None before they are finished.

    Where the best rate is the smallest or the largest one, the grid gets another rate beyond it.

    Args:
        finished: runs that are finished.
        base: the configuration without `lr` and `seed`.
        rates: the first grid, increasing.
        seeds: each rate is tried with all of them.
        scores: of an outcome; the larger the better. The second one decides between rates with the same first one.

    Raises:
        RuntimeError: if the best one of `LIMIT` rates is still at the edge.
    """
    rates = list(rates)
    while True:
        runs = {lr: [base | {"lr": lr, "seed": seed} for seed in seeds] for lr in rates}
        every = [run for of_rate in runs.values() for run in of_rate]
        if any(run not in finished for run in every):
            return every, None
        of_rates = [[scores(finished[run].outcome) for run in runs[lr]] for lr in rates]
        means = [tuple(map(statistics.mean, zip(*each, strict=True))) for each in of_rates]
        best = means.index(max(means))
        if 0 < best < len(rates) - 1:
            return every, rates[best]
        if len(rates) == LIMIT:
            span = f"{rates[0]:g} to {rates[-1]:g}"
            raise RuntimeError(f"the best of {LIMIT} rates from {span} is at the edge, for {base}")
        rates = [*rates, rates[-1] * FACTOR] if best else [rates[0] / FACTOR, *rates]
