"""Times by the host's clock, of several arms in turn; their medians, and their ratios with quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

Samples = dict[str, list[float]]
Clock = Callable[[], float]


def synchronize(device: str) -> Callable[[], object]:
    """The function that waits until `device` is idle."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def call_each(call: Callable[[object], object], inputs: Sequence[object]) -> None:
    for item in inputs:
        call(item)


def host_clock(
    run: Callable[[], object],
    calls: int = 1,
    synchronize: Callable[[], object] = lambda: None,
    settle: Callable[[], object] = lambda: None,
) -> Clock:
    """A clock that calls `settle`, then times `run`, which makes `calls` calls, and returns milliseconds per call."""

    def sample() -> float:
        settle()
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        return 1e3 * (time.perf_counter() - begin) / calls

    return sample


def interleave(
    clocks: dict[str, Clock], rounds: int, warm_up: int = 2, counts: Mapping[str, int] = MappingProxyType({})
) -> Samples:
    """Milliseconds per call. Every round samples each arm once, so that a disturbance of the machine affects all arms.

    An arm in `counts` is sampled at most that many times, in evenly spaced rounds.
    """
    samples: Samples = {name: [] for name in clocks}
    strides = {name: stride(rounds, counts.get(name, rounds)) for name in clocks}
    for index in range(-warm_up, rounds):
        for name, clock in clocks.items():
            if index < 0 or index % strides[name] == 0:
                elapsed = clock()
                if index >= 0:
                    samples[name].append(round(elapsed, 6))
    return samples


def stride(rounds: int, count: int) -> int:
    """The number of rounds from one sample to the next, of an arm that has at most `count` samples."""
    return -(-rounds // count)


def fastest(samples: Samples, names: list[str]) -> str:
    """The arm of `names` with the smallest median."""
    return min(names, key=lambda name: statistics.median(samples[name]))


def ratio(samples: Samples, name: str, other: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of time(name) / time(other) in a round; `other` is sampled in every round."""
    beside = samples[other][:: stride(len(samples[other]), len(samples[name]))]
    ratios = [a / b for a, b in zip(samples[name], beside, strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, lower, upper


def ratio_text(samples: Samples, name: str, other: str) -> str:
    """The ratio as a table shows it; empty for an arm and itself."""
    return "" if name == other else "{:.2f} ({:.2f} to {:.2f})".format(*ratio(samples, name, other))
