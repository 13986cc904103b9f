"""How long a step of a method takes beside one of SGD, for comparisons at equal time."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any

from ..measuring.timing import Clock, host_clock, interleave, ratio
from .data import Sources
from .question import Config
from .task import task_of
from .training import batches_of, initial_model, method_of

CALLS = 5  # steps by one reading of the clock


def step_seconds(config: Config, sources: Sources, rounds: int) -> dict[str, Any]:
    """Times of the method's step and of SGD's, in turn, on the first batch at the initial weights.

    The learning rate is zero for both, so that all rounds time the same step.

    Returns:
        seconds, sgd_seconds: medians.
        ratio: the median of the ratios of a round, with its quartiles `ratio_low` and `ratio_high`.
    """
    with ExitStack() as stack:
        clocks = {
            name: _clock(config | {"method": method, "steps": 1}, sources, stack)
            for name, method in (("own", config["method"]), ("SGD", "SGD"))
        }
        samples = interleave(clocks, rounds, warm_up=5)
    own, sgd = (statistics.median(samples[name]) / 1e3 for name in ("own", "SGD"))
    middle, low, high = ratio(samples, "own", "SGD")
    return {"seconds": own, "sgd_seconds": sgd, "ratio": middle, "ratio_low": low, "ratio_high": high}


def _clock(config: Config, sources: Sources, stack: ExitStack) -> Clock:
    """Times `CALLS` steps; what captures the model is removed with the stack."""
    task = task_of(config, sources)
    batch = next(batches_of(config, task.train))
    start = method_of(config).start
    step = stack.enter_context(start(initial_model(config, task), 0.0, config["momentum"], task.counts))

    def run() -> None:
        for _ in range(CALLS):
            step(batch.inputs, batch.labels)

    return host_clock(run, CALLS)
