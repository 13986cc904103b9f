"""When a captured model is verified: for the first calls of each kind."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from .batch import tensors_in
from .findings import (
    BackwardFailed,
    NotFinite,
    NothingToProve,
    NotRepeatable,
    Unprovable,
    Verification,
    WrongGradients,
    tolerance_of,
)
from .proof import Proof
from .runs import Call, Runs
from .sketch import norm, sketch

if TYPE_CHECKING:
    from .preconditioner import Preconditioner
    from .taps import Tap

# Proofs of one module, and of them for new batch sizes or numbers among the arguments; each takes about two steps.
MOST, SIZES = 40, 8
# Calls of a kind that are proven, as long as the ones before left something open; and of calls after the weights moved.
TRIES, MOVES = (1, 2, 4, 16, 64), 4


class _Outcome(NamedTuple):
    """Of an attempt to verify a call.

    Attributes:
        verification: if it succeeded.
        note: what was not verified and why, or empty.
        is_open: whether another call of the kind may show more.
        cause: why the forward cannot be called another time, if it cannot.
    """

    verification: Verification | None = None
    note: str = ""
    is_open: bool = False
    cause: NotRepeatable | None = None


class _Kind(NamedTuple):
    """Of calls: what a proof depends on, the batch size, and whole numbers among the arguments."""

    pattern: tuple
    size: tuple
    values: tuple


@dataclass
class _Open:
    """A kind of which not all is proven.

    Attributes:
        calls, proofs: how many there were.
        moves: how many of the proofs came with new weights.
        version: of the weights in the last of them.
    """

    calls: int = 0
    proofs: int = 0
    moves: int = 0
    version: int | None = None

    def is_due(self, version: int) -> bool:
        """Whether a call with weights of that version is to be proven."""
        self.calls += 1
        has_moved = version != self.version and self.moves < MOVES
        if has_moved:
            self.moves, self.version = self.moves + 1, version
        return has_moved or self.calls in TRIES

    def refuse(self) -> None:
        """Prove the next call too, in the same way."""
        self.moves, self.version = 0, None


class Verifier:
    """Proves calls of a captured model before their first direction.

    A call is of a new kind if its module, its mode, what is trained, arguments that are no tensors, or which dimensions
    of the tensors are as large as the batch are new; or the batch size or a whole number, up to `SIZES` of them. Of
    every module that is called from outside up to `MOST` calls are proven. Where a proof leaves something open, as of
    weights behind zeros, so are later calls of the kind: those in `TRIES`, and the first `MOVES` with new weights.

    Attributes:
        is_proving: whether forwards and backwards are those of a proof now.
    """

    def __init__(self, capture: Preconditioner, is_on: bool) -> None:
        self.is_proving = False
        self._capture, self._is_on = capture, is_on
        # Exact signatures that need no look any more; what was proven.
        self._settled: set[tuple] = set()
        self._patterns: set[tuple] = set()
        self._numbers: dict[Tap, tuple[set[tuple], set[tuple]]] = {}
        self._proofs: Counter[Tap] = Counter()
        self._open: dict[_Kind, _Open] = {}
        self._warned: set[tuple[Tap, str]] = set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls inside are not verified."""
        saved, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = saved

    def run(self, call: Call) -> object:
        """The output of a call, which is verified first if its kind is new.

        Raises:
            WrongGradients: if the capture would give wrong gradients.
        """
        kind = self._new_kind(call) if self._is_on else None
        if kind is None:
            return self._capture.run(call)
        try:
            outcome = self._attempt(call, side=self._open[kind].proofs % 2)
            output = self._output_after(call, outcome)
        except Exception:
            self._open[kind].refuse()
            raise
        self._remember(call.tap, kind, outcome.is_open)
        if outcome.note:  # now, since a forward that fails says enough
            self._warn(call.tap, outcome)
        return output

    def _output_after(self, call: Call, outcome: _Outcome) -> object:
        if outcome.cause is not None:
            return self._output_of_only_call(call, outcome.cause)
        if outcome.verification is None or not outcome.verification.outputs:
            return self._capture.run(call)
        buffers = [(x, x.clone()) for x in self._capture.model.buffers()]
        output = self._capture.run(call)
        try:
            self._check_hooks(call, output, outcome.verification)
        except WrongGradients:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            raise
        return output

    def _new_kind(self, call: Call) -> _Kind | None:
        """The kind of a call, if that is to be verified."""
        tap, arrays = call.tap, call.arrays
        size, (mode, values) = call.batch_size, self._mode(call)
        exact = *mode, *values, *[x.shape for x in arrays]
        if exact in self._settled or not _is_possible(arrays, self._capture.model):
            return None
        kind = _Kind((*mode, *_equal_sizes(arrays, size)), (*mode, size), (*mode, *values))
        sizes, numbers = self._numbers.setdefault(tap, (set(), set()))
        is_new = kind.pattern not in self._patterns
        is_new |= kind.size not in sizes and len(sizes) < SIZES
        is_new |= kind.values not in numbers and len(numbers) < SIZES
        if not is_new or self._proofs[tap] == MOST:
            if len(self._settled) > 1000:
                self._settled.clear()
            self._settled.add(exact)
            return None
        version = sum([parameter._version for parameter, _ in self._capture.guards.values()])
        return kind if self._open.setdefault(kind, _Open()).is_due(version) else None

    def _remember(self, tap: Tap, kind: _Kind, is_open: bool) -> None:
        self._proofs[tap] += 1
        self._open[kind].proofs += 1
        if is_open and self._open[kind].calls < TRIES[-1]:
            return
        del self._open[kind]
        sizes, numbers = self._numbers[tap]
        self._patterns.add(kind.pattern)
        sizes.add(kind.size)
        numbers.add(kind.values)

    def _mode(self, call: Call) -> tuple[tuple, tuple]:
        """What a proof depends on besides sizes, and whole numbers among the arguments."""
        capture = self._capture
        flags = [module.training for module in capture.modules]
        flags += [parameter.requires_grad for parameter, _ in capture.guards.values()]
        if len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], Tensor):
            return (call.tap, *flags, call.args[0].dtype), ()
        leaves = tree_leaves((call.args, call.kwargs))
        others = [
            leaf.dtype if isinstance(leaf, Tensor) else leaf if isinstance(leaf, (bool, str, Enum)) else type(leaf)
            for leaf in leaves
        ]
        return (call.tap, *flags, *call.kwargs, *others), tuple(leaf for leaf in leaves if type(leaf) is int)

    def _attempt(self, call: Call, hooks: bool = False, side: int = 0) -> _Outcome:
        """Verify a call; only wrong gradients, and what would fail without verification too, stop a training."""
        try:
            verification = self.verification(call, hooks, side)
            return _Outcome(verification, verification.note, verification.is_open)
        except WrongGradients:
            raise
        except BackwardFailed as error:
            raise error.__cause__ from None
        except NothingToProve:
            return _Outcome(is_open=True)
        except Unprovable as error:
            cause = error if isinstance(error, NotRepeatable) else None
            return _Outcome(None, str(error), isinstance(error, NotFinite), cause)
        except Exception as error:  # of the proof itself, which is no reason to stop
            return _Outcome(note=f"{type(error).__name__}: {error}")

    def verification(self, call: Call, hooks: bool = False, side: int = 0) -> Verification:
        """The proof of a call.

        Autocast is off, because rounding hides errors, unless the proof cannot be carried out without it. Hooks around
        the forwards of modules inside run if it fails without them.

        Raises:
            WrongGradients, Unprovable: see `Proof.verification`.
        """
        autocast = False
        while True:
            self.is_proving = True
            try:
                with self.paused(), Runs(self._capture, call, hooks, autocast, side) as runs:
                    return Proof(runs).verification()
            except (NotFinite, NotRepeatable):
                raise
            except (Unprovable, WrongGradients) as error:
                if runs.leaves_hooks_out:
                    hooks = True
                elif runs.lacks_autocast and isinstance(error, Unprovable):
                    autocast = True
                else:
                    raise
            finally:
                self.is_proving = False

    def _output_of_only_call(self, call: Call, cause: NotRepeatable) -> object:
        """Where the forward cannot be called again, the proof has made the only call."""
        if cause.output is not None and not any(x.requires_grad for x in call.arrays):
            return cause.output[0]
        try:
            return self._capture.run(call)
        except Exception as error:
            raise RuntimeError(
                f"the forward of '{call.tap.name}' ({type(call.tap.module).__name__}) can be called only once, and its"
                f" verification calls it several times ({type(error).__name__}: {error}): pass verify=False"
            ) from error

    def _check_hooks(self, call: Call, output: object, verification: Verification) -> None:
        """Verify the call with hooks, if they change its outputs; those that look on see what the user calls only."""
        outputs = tensors_in(output)
        for n, expected in verification.outputs.items():
            if n >= len(outputs) or not outputs[n].is_floating_point():
                continue
            got = sketch(outputs[n], outputs[n])
            tolerance = max(verification.tolerance, tolerance_of(outputs[n], True))
            if got.shape != expected.shape or norm([got - expected]) > tolerance * norm([expected]):
                outcome = self._attempt(call, hooks=True)
                if outcome.note:
                    self._warn(call.tap, outcome)
                return

    def _warn(self, tap: Tap, outcome: _Outcome) -> None:
        if (tap, outcome.note) in self._warned:
            return
        self._warned.add((tap, outcome.note))
        extent = "" if outcome.verification is None else " completely"
        warnings.warn(
            f"the per-sample gradients of '{tap.name}' ({type(tap.module).__name__}) could not be verified{extent}:"
            f" {outcome.note}. They are used all the same; verify=False leaves the verification out",
            stacklevel=2,
        )


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
