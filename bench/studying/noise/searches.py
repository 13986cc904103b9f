"""The runs of branches: for each batch size those of the search for its best rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..contests.tuning import grid, refine, search
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
        of_size = base | {"batch_size": size}
        of_search = without(of_size | searching, "seed")
        on_grid, best = search(finished, of_search, rates, [seed], scores)
        yield from on_grid
        if best is None:
            return
        nearby, lr = refine(finished, of_search, [best], [seed], scores)
        yield from nearby
        if lr is not None:
            yield of_size | counting | {"lr": lr}
        rates = grid(best / 2, 3)  # a quarter of the batch has at least a quarter of the best rate


def scores(outcome: dict[str, Any]) -> tuple[float, float]:
    """Fewer steps are better, and where the goal is not reached, a smaller loss."""
    steps, loss = outcome["steps"], outcome["loss"]
    return -math.inf if steps is None else -steps, -math.inf if loss is None else -loss
