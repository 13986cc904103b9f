"""Which calls of a captured model are verified: the first ones of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from ...nests import modules_in
from ..context import CaptureContext
from ..model_call import ModelCall
from ..recorders.recorder import Recorder

# The largest number of proofs of one module, and of new batch sizes or numbers among the arguments that are proven.
# A proof takes about two steps.
_MOST, _SIZES = 40, 8
# The calls of a kind that are proven, as long as the proofs before left something open; and how many are because the
# weights have changed.
_TRIES, _MOVES = (1, 2, 4, 16, 64), 4


class Kind(NamedTuple):
    """The kind of a call.

    Attributes:
        pattern: what a proof depends on besides sizes and numbers.
        size: the batch size, with the mode of the call.
        values: the whole numbers among the arguments, with the mode of the call.
    """

    pattern: tuple
    size: tuple
    values: tuple


@dataclass
class _OpenKind:
    """A kind of which not all is proven.

    Attributes:
        calls, proofs: how many there were.
        moves: how many of the proofs came with new weights.
        version: the version of the weights in the last of these.
    """

    calls: int = 0
    proofs: int = 0
    moves: int = 0
    version: int | None = None

    def is_due(self, version: int) -> bool:
        """Whether a call, which this counts, with weights of that version is to be proven."""
        self.calls += 1
        has_moved = version != self.version and self.moves < _MOVES
        if has_moved:
            self.moves, self.version = self.moves + 1, version
        return has_moved or self.calls in _TRIES

    def is_proven(self, is_open: bool) -> bool:
        """Whether no more calls are to be proven, after a proof that left something open or did not."""
        self.proofs += 1
        return not is_open or self.calls >= _TRIES[-1]

    def refuse(self) -> None:
        """The next call is to be proven too, in the same way."""
        self.moves, self.version = 0, None


class Kinds:
    """The kinds of calls that a captured model has met.

    A call is of a new kind if its module, its mode, what is trained, arguments that are no tensors, or which dimensions
    of the tensors are as large as the batch are new; or the batch size or a whole number, up to `_SIZES` of them. Of
    every module that is called from outside up to `_MOST` calls are proven. Where a proof leaves something open, as of
    weights behind zeros, so are later calls of the kind: those in `_TRIES`, and the first `_MOVES` with new weights.
    """

    def __init__(self, context: CaptureContext) -> None:
        self._context = context
        self._modules = modules_in(context.model)
        # Exact signatures of calls that need not be looked at again.
        self._settled: set[tuple] = set()
        # The patterns, and by recorders the sizes and values, of kinds that are proven.
        self._patterns: set[tuple] = set()
        self._numbers: dict[Recorder, tuple[set[tuple], set[tuple]]] = {}
        self._proofs: Counter[Recorder] = Counter()
        self._open: dict[Kind, _OpenKind] = {}

    def due(self, call: ModelCall) -> Kind | None:
        """The kind of a call, if the call is to be proven."""
        recorder, arrays = call.recorder, call.arrays
        size, (mode, values) = call.batch_size, self._mode(call)
        exact = *mode, *values, *[x.shape for x in arrays]
        if exact in self._settled or not _is_possible(arrays, self._context.model):
            return None
        kind = Kind((*mode, *_equal_sizes(arrays, size)), (*mode, size), (*mode, *values))
        if not self._is_new(kind, recorder) or self._proofs[recorder] == _MOST:
            if len(self._settled) > 1000:
                self._settled.clear()
            self._settled.add(exact)
            return None
        version = sum([parameter._version for parameter in self._context.parameters])
        return kind if self._open.setdefault(kind, _OpenKind()).is_due(version) else None

    def side(self, kind: Kind) -> int:
        """The end of their range, 0 or 1, that uniform random numbers are near in the next proof of a kind."""
        return self._open[kind].proofs % 2

    def refuse(self, kind: Kind) -> None:
        """The proof has failed: the next call of the kind is to be proven too."""
        self._open[kind].refuse()

    def remember(self, recorder: Recorder, kind: Kind, is_open: bool) -> None:
        """A call of the kind is proven, and may have left something open."""
        self._proofs[recorder] += 1
        if not self._open[kind].is_proven(is_open):
            return
        del self._open[kind]
        sizes, numbers = self._numbers[recorder]
        self._patterns.add(kind.pattern)
        sizes.add(kind.size)
        numbers.add(kind.values)

    def _is_new(self, kind: Kind, recorder: Recorder) -> bool:
        sizes, numbers = self._numbers.setdefault(recorder, (set(), set()))
        return (
            kind.pattern not in self._patterns
            or (kind.size not in sizes and len(sizes) < _SIZES)
            or (kind.values not in numbers and len(numbers) < _SIZES)
        )

    def _mode(self, call: ModelCall) -> tuple[tuple, tuple]:
        """What a proof depends on besides sizes, and the whole numbers among the arguments."""
        flags = [module.training for module in self._modules]
        flags += [parameter.requires_grad for parameter in self._context.parameters]
        if len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], Tensor):
            return (call.recorder, *flags, call.args[0].dtype), ()
        leaves = tree_leaves((call.args, call.kwargs))
        others = [
            leaf.dtype if isinstance(leaf, Tensor) else leaf if isinstance(leaf, (bool, str, Enum)) else type(leaf)
            for leaf in leaves
        ]
        return (call.recorder, *flags, *call.kwargs, *others), tuple(leaf for leaf in leaves if type(leaf) is int)


def _equal_sizes(arrays: Sequence[Tensor], size: int | None) -> list[tuple[bool, ...]]:
    """Which dimensions are as large as the batch."""
    return [tuple(n == size for n in x.shape) for x in arrays]


def _is_possible(arrays: Sequence[Tensor], model: nn.Module) -> bool:
    """Whether a proof can run here and now: on numbers, outside of backwards, modes and CUDA graphs."""
    if _current_graph_task_id() != -1 or _get_current_dispatch_mode() is not None:
        return False
    if any(x.is_meta for x in [*arrays, *model.parameters()]):
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
