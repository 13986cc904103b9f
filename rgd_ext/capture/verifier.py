"""When a captured model is verified: for the first calls of each kind."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from .batch import tensors_in
from .proof import BackwardFailed, NotFinite, NothingToProve, Proof, Refuted, Unprovable, Verification, tolerance_of
from .runs import Call, Runs
from .sketch import norm, sketch

if TYPE_CHECKING:
    from .preconditioner import Preconditioner
    from .taps import Tap

# Proofs of one module; every one takes about two steps.
MOST, SIZES, TRIES = 32, 8, 4


class Verifier:
    """Proves calls of a captured model before their first direction.

    A kind of call is a module, its mode, what is trained, arguments that are no tensors, and which dimensions of the
    tensors are as large as the batch. New kinds of every module that is called from outside are proven, up to `MOST`,
    and so are the first `SIZES` batch sizes. Where a proof shows nothing yet, as of weights behind zeros, the next
    calls are proven too, `TRIES` in all.

    Attributes:
        is_proving: whether forwards and backwards are those of a proof now.
    """

    def __init__(self, capture: Preconditioner, is_on: bool) -> None:
        self.is_proving = False
        self._capture, self._is_on = capture, is_on
        # What needs no look any more, exactly; and the kinds.
        self._settled: set[tuple] = set()
        self._patterns: dict[Tap, set[tuple]] = {}
        self._sizes: dict[Tap, set[tuple]] = {}
        self._tries: Counter[tuple] = Counter()
        self._warned: set[Tap] = set()

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
            Refuted: if the capture would give wrong gradients.
        """
        run, arrays = self._capture.run, call.arrays
        if not self._is_on:
            return run(call)
        mode = self._mode(call)
        exact = *mode, *[x.shape for x in arrays]
        if exact in self._settled or not _is_possible(arrays, self._capture.model):
            return run(call)
        kinds = (*mode, *_equal_sizes(arrays)), (*mode, arrays[0].shape[0] if arrays else None)
        if not self._is_new(call.tap, *kinds):
            if len(self._settled) > 1000:
                self._settled.clear()
            self._settled.add(exact)
            return run(call)
        verification, note, found, is_open = None, "", None, False
        try:
            verification = self.verification(call)
            note, is_open = verification.note, verification.has_zeros
        except BackwardFailed as error:
            raise error.__cause__ from None
        except NothingToProve:
            is_open = True
        except Unprovable as error:
            note, found, is_open = str(error), error.output, isinstance(error, NotFinite)
        except Refuted:
            raise
        except Exception as error:  # of the proof itself, which is no reason to stop a training
            note = f"{type(error).__name__}: {error}"
        # Where the forward cannot be called again, the proof has made the only call. If this one fails, it says why.
        output = run(call) if found is None or any(x.requires_grad for x in arrays) else found[0]
        self._tries[kinds] += 1
        if not is_open or self._tries[kinds] == TRIES:
            self._patterns.setdefault(call.tap, set()).add(kinds[0])
            self._sizes.setdefault(call.tap, set()).add(kinds[1])
        if note:
            self._warn(call.tap, note)
        if verification is not None and verification.outputs:
            self._see_hooks(call, output, verification)
        return output

    def _mode(self, call: Call) -> tuple:
        """What a proof depends on besides sizes."""
        capture = self._capture
        flags = [module.training for module in capture.modules]
        flags += [parameter.requires_grad for parameter, _ in capture.guards.values()]
        if len(call.args) == 1 and not call.kwargs:
            return call.tap, *flags, call.args[0].dtype if isinstance(call.args[0], Tensor) else None
        leaves = tree_leaves((call.args, call.kwargs))
        others = [leaf if isinstance(leaf, (bool, str, Tensor)) else type(leaf) for leaf in leaves]
        return call.tap, *flags, *call.kwargs, *[x.dtype if isinstance(x, Tensor) else x for x in others]

    def _is_new(self, tap: Tap, pattern: tuple, size: tuple) -> bool:
        patterns, sizes = self._patterns.get(tap, ()), self._sizes.get(tap, ())
        return (pattern not in patterns and len(patterns) < MOST) or (size not in sizes and len(sizes) < SIZES)

    def _see_hooks(self, call: Call, output: object, verification: Verification) -> None:
        """Verify the call with hooks, if they change its outputs; those that look on see what the user calls only."""
        outputs = tensors_in(output)
        for n, expected in verification.outputs.items():
            if n >= len(outputs) or not outputs[n].is_floating_point():
                continue
            got = sketch(outputs[n], outputs[n])
            tolerance = max(verification.tolerance, tolerance_of(outputs[n], True))
            if got.shape != expected.shape or norm([got - expected]) > tolerance * norm([expected]):
                try:
                    self.verification(call, hooks=True)
                except Unprovable as error:
                    self._warn(call.tap, str(error))
                return

    def verification(self, call: Call, hooks: bool = False, autocast: bool = False) -> Verification:
        """The proof of a call.

        Hooks around the forwards of modules inside run if it fails without them, and autocast is enabled if it cannot
        be carried out without it: rounding hides errors.

        Raises:
            Refuted, Unprovable: see `Proof.verification`.
        """
        self.is_proving = True
        try:
            with self.paused(), Runs(self._capture, call, hooks, autocast) as runs:
                return Proof(runs, call.tap, self._capture.batch_norm).verification()
        except (Unprovable, Refuted) as error:
            if not runs.leaves_hooks_out and (not runs.lacks_autocast or isinstance(error, Refuted)):
                raise
            hooks, autocast = runs.leaves_hooks_out or hooks, autocast or not runs.leaves_hooks_out
        finally:
            self.is_proving = False
        return self.verification(call, hooks, autocast)

    def _warn(self, tap: Tap, reason: str) -> None:
        if tap in self._warned:
            return
        self._warned.add(tap)
        warnings.warn(
            f"the per-sample gradients of '{tap.name}' ({type(tap.module).__name__}) could not be verified: {reason}."
            " They are used all the same; verify=False leaves the verification out",
            stacklevel=2,
        )


def _equal_sizes(arrays: Sequence[Tensor]) -> list[tuple[bool, ...]]:
    """Which dimensions are as large as the batch."""
    size = arrays[0].shape[0] if arrays else None
    return [tuple(n == size for n in x.shape) for x in arrays]


def _is_possible(arrays: Sequence[Tensor], model: nn.Module) -> bool:
    """Whether a proof can run here and now: on numbers, outside of backwards, modes and CUDA graphs."""
    if _current_graph_task_id() != -1 or _get_current_dispatch_mode() is not None:
        return False
    if any(x.is_meta for x in [*arrays, *model.parameters()]):
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
