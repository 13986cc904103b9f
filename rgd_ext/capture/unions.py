"""Unions of batches, whose backwards make one direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from . import steps
from .factors import Dense, Factor
from .sums import add, join

# What a backward contributed.
Contributed: TypeAlias = dict[nn.Parameter, Factor]
# The numbers of the calls of the model that a backward goes through, each with its number of samples.
Passed: TypeAlias = set[tuple[int, int]]

NESTED_BLOCKS = "accumulate() blocks cannot be nested: backwards of the outer one are already collected"
DEFERRED = (
    "accumulate() while the handle defers: backwards are collected until handle.write() already. Leave the block out,"
    " or call handle.defer(False) first"
)
INSIDE_BLOCK = (
    "defer() or write() inside of a block of handle.accumulate(), which collects backwards and writes their direction"
    " when it ends: call it outside of the block"
)
LOST = (
    "defer(False) before the direction of the backwards collected was written: call handle.write() first, or"
    " handle.drop() to forget them"
)
NOT_DEFERRED = (
    "write() while the handle does not defer, so that every backward writes its direction itself: call handle.defer()"
    " before the backwards"
)
_SEVERAL = (
    "this backward goes through calls of the model whose backwards were collected as those of separate samples before,"
    " so which samples are the same cannot be told: run one backward of the sum of these losses"
)


@dataclass
class _Samples:
    """Some samples.

    Attributes:
        size: B.
        calls: that backwards of theirs went through.
        parts: what each of these backwards contributed.
    """

    size: int
    calls: Passed = field(default_factory=set)
    parts: list[Contributed] = field(default_factory=list)

    def taken(self, parameter: nn.Parameter) -> Factor:
        """The contributions to `parameter`, which are not kept."""
        found = [part.pop(parameter) for part in self.parts if parameter in part]
        return add(found) if found else Dense(parameter.new_zeros(self.size, *parameter.shape))


class BatchUnion:
    """Contributions of several backwards, whose direction is to be written.

    Backwards through one call of the model are of the same samples, whose contributions add up; the others are of
    samples of their own. Until nothing is left here, steps of torch's optimizers along the direction are refused.

    Args:
        is_deferred: whether `handle.write()` is to write it, not the end of a block.
    """

    def __init__(self, is_deferred: bool) -> None:
        self.is_deferred = is_deferred
        self._samples: list[_Samples] = []
        steps.watch(self)

    def __bool__(self) -> bool:
        return bool(self._samples)

    def parameters(self) -> list[nn.Parameter]:
        """Those with contributions."""
        return list(dict.fromkeys(p for each in self._samples for part in each.parts for p in part))

    def add(self, contributions: Contributed, calls: Passed) -> None:
        """Keep what a backward contributed.

        Raises:
            RuntimeError: if it ties samples that were separate so far.
        """
        same = [each for each in self._samples if not each.calls.isdisjoint(calls)]
        if len(same) > 1:
            raise RuntimeError(_SEVERAL)
        if not same:
            same = [_Samples(next(iter(contributions.values())).batch_size)]
            self._samples += same
        same[0].calls |= calls
        # Added up at the end: an error in the midst of that would leave half of a sum.
        same[0].parts.append(contributions)

    def joined(self) -> Iterator[tuple[nn.Parameter, Factor]]:
        """Each of `parameters` with its contributions in the union, of which nothing is left here."""
        parameters, samples, self._samples = self.parameters(), self._samples, []
        for parameter in parameters:
            yield parameter, join([each.taken(parameter) for each in samples])

    def drop(self) -> None:
        """Forget what was collected."""
        self._samples = []
