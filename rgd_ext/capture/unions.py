"""Unions of batches, whose backwards make one direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from ..contributions.factor import Dense, Factor
from ..contributions.ledger import Contributions
from ..contributions.merge import concatenate_batches, sum_uses
from .sinks import CallNumbers
from .steps import StepCheck, check_steps

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
_NOT_WRITTEN = (
    "an optimizer's step along a direction that is not written yet: handle.defer() has collected its backwards. Call"
    " handle.write() before the step, and before gradients are clipped or unscaled; handle.drop() forgets them"
)
_IN_BLOCK = (
    "an optimizer's step inside a block of handle.accumulate(), which writes the direction of the backwards collected"
    " when it ends: call step() after the block"
)
_SEVERAL = (
    "this backward goes through calls of the model whose backwards were collected as those of separate samples before,"
    " so which samples are the same cannot be told: run one backward of the sum of these losses"
)
_TORN = (
    "what was collected is lost, because an earlier handle.write() failed while it joined the batches: call"
    " handle.drop(), and run the backwards again"
)
_INCOMPLETE = (
    "per_parameter=True, and only some of the collected batches use parameter '{}', so that its noise scale would mix"
    " samples that use it with others that cannot: let every batch of a union use it, or observe without per_parameter."
    " With handle.defer(), call handle.drop() to forget these batches"
)


class _Samples:
    """The samples of one batch, and what the backwards through its calls of the model have contributed.

    Args:
        size: the number of samples.
        calls: the calls of the model that these backwards went through.

    Attributes:
        size, calls: as given.
    """

    def __init__(self, size: int, calls: CallNumbers) -> None:
        self.size, self.calls = size, calls
        # What each backward contributed, by parameter.
        self._parts: list[dict[nn.Parameter, Factor]] = []

    def add(self, contributions: Contributions, calls: CallNumbers) -> None:
        """Keep what another backward contributed."""
        self.calls = self.calls | calls
        # The sum is formed at the end: an error in the midst of it would leave half of it.
        self.put(dict(contributions.factors()))

    def put(self, contributions: dict[nn.Parameter, Factor]) -> None:
        """Keep contributions, by parameter."""
        self._parts.append(contributions)

    @property
    def is_joined(self) -> bool:
        """Whether there is one contribution to each parameter."""
        return len(self._parts) == 1

    def items(self) -> list[tuple[nn.Parameter, Factor]]:
        """The contributions, parameter by parameter, if they are joined."""
        return [*self._parts[0].items()]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that have contributions, some more than once."""
        return (parameter for part in self._parts for parameter in part)

    def pop(self, parameter: nn.Parameter) -> Factor:
        """The sum of the contributions to `parameter`, which are not kept any longer."""
        found = [part.pop(parameter) for part in self._parts if parameter in part]
        return sum_uses(found) if found else Dense(parameter.new_zeros(self.size, *parameter.shape))


class BatchUnion(StepCheck):
    """The contributions of several backwards, whose direction is to be written.

    Backwards through one call of the model belong to the same samples, and their contributions are added; other
    backwards belong to other samples. As long as there are contributions here, steps of torch's optimizers along the
    direction are refused.

    Args:
        is_deferred: whether `handle.write()` will write the direction, and not the end of a block.
        stepped_of: gives the parameters that optimizers step in the place of some that layers use.
    """

    def __init__(
        self, is_deferred: bool, stepped_of: Callable[[Iterable[nn.Parameter]], Sequence[nn.Parameter]]
    ) -> None:
        self._is_deferred, self._is_torn = is_deferred, False
        self._stepped_of = stepped_of
        self._samples: list[_Samples] = []
        check_steps(self)

    def __bool__(self) -> bool:
        return bool(self._samples)

    @property
    def is_deferred(self) -> bool:
        """Whether `handle.write()` will write the direction, and not the end of a block."""
        return self._is_deferred

    def stepped(self) -> Sequence[nn.Parameter]:
        return self._stepped_of(self.parameters())

    def check(self) -> None:
        raise RuntimeError(_NOT_WRITTEN if self.is_deferred else _IN_BLOCK)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that have contributions."""
        return list(dict.fromkeys(parameter for each in self._samples for parameter in each.parameters()))

    def add(self, contributions: Contributions, calls: CallNumbers) -> None:
        """Keep what a backward contributed.

        Args:
            contributions: the contributions.
            calls: the calls of the model that the backward went through.

        Raises:
            RuntimeError: if the backward ties samples that were separate so far.
        """
        same = [each for each in self._samples if not each.calls.isdisjoint(calls)]
        # Batches that were joined, by a `write` that failed, have more samples.
        if len(same) > 1 or (same and same[0].size != contributions.batch_size):
            raise RuntimeError(_SEVERAL)
        if not same:
            same = [_Samples(contributions.batch_size, calls)]
            self._samples += same
        same[0].add(contributions, calls)

    def check_complete(self, name_of: Callable[[nn.Parameter], str]) -> None:
        """Raise RuntimeError if a parameter has contributions from some of the batches only."""
        self._check_not_torn()
        used = [set(each.parameters()) for each in self._samples]
        for parameter in self.parameters():
            if not all(parameter in each for each in used):
                raise RuntimeError(_INCOMPLETE.format(name_of(parameter)))

    @property
    def batch_size(self) -> int:
        """The number of samples in the union."""
        return sum(each.size for each in self._samples)

    def joined(self) -> list[tuple[nn.Parameter, Factor]]:
        """Each parameter and its contributions in the union, whose batches are kept as one from now on.

        Raises:
            RuntimeError: if an earlier call has failed half-way.
        """
        self._check_not_torn()
        if len(self._samples) > 1 or not self._samples[0].is_joined:
            # Parameter by parameter, so that no more than one has its contributions twice in memory.
            self._is_torn = True
            whole = _Samples(self.batch_size, set().union(*(each.calls for each in self._samples)))
            whole.put({parameter: self._pop(parameter) for parameter in self.parameters()})
            self._samples, self._is_torn = [whole], False
        return self._samples[0].items()

    def _check_not_torn(self) -> None:
        if self._is_torn:
            raise RuntimeError(_TORN)

    def _pop(self, parameter: nn.Parameter) -> Factor:
        return concatenate_batches([each.pop(parameter) for each in self._samples])

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        self.drop()  # a union with the contributions of some parameters alone is none

    def drop(self) -> None:
        """Forget all contributions."""
        self._samples, self._is_torn = [], False
