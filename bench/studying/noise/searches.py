"""The runs of branches: for each batch size those of the search for its best rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..contests.tuning import FACTOR, grid, search
from ..question import Config, Finished, without

SIZES = (512, 128, 32, 8)  # each a quarter of the one before
SEARCH_SEEDS, RESULT_SEEDS = 1000, 2000  # of the batches, beside the seed of the trunk
SEARCH_PATHS, RESULT_PATHS = 4, 8


def branches(finished: Finished, base: Config, rate: float, sizes: tuple[int, ...] = SIZES) -> Iterator[Config]:
    """What is to be run now of the branches from one checkpoint.

    For each batch size there is a search for the best rate, and then a branch at that rate with other batches, since
    the least of several noisy numbers of steps is too small.

    Args:
        finished: runs that are finished.
        base: the configuration without `part` and what is chosen here.
        rate: in the middle of the first grid for the largest batch.
        sizes: of the batches, falling.
    """
    rates, seed = grid(rate, 3), base["seed"]
    searching = {"part": "search", "paths": SEARCH_PATHS, "batch_seed": SEARCH_SEEDS + seed}
    counting = {"part": "branch", "paths": RESULT_PATHS, "batch_seed": RESULT_SEEDS + seed}
    for size in sizes:
        of_size = base | searching | {"batch_size": size}
        tried, best = search(finished, without(of_size, "seed"), rates, [seed], scores)
        if best is not None:
            # Steps near the best rate change little: half a factor of the search is fine enough.
            tried += [of_size | {"lr": best * math.sqrt(FACTOR) ** sign} for sign in (-1, 1)]
        yield from tried
        if best is None:
            return
        if all(run in finished for run in tried):
            lr = max(tried, key=lambda run: scores(finished[run].outcome))["lr"]
            yield of_size | counting | {"lr": lr}
        rates = grid(best / 2, 3)  # a quarter of the batch has at least a quarter of the best rate


def scores(outcome: dict[str, Any]) -> tuple[float, float]:
    """Fewer steps are better, and where the goal is not reached, a smaller loss."""
    steps, loss = outcome["steps"], outcome["loss"]
    return -math.inf if steps is None else -steps, -math.inf if loss is None else -loss
