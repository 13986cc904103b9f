"""When a captured model is verified: for the first calls of each kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .batch import tensors_in
from .proof import NothingToProve, Proof, Refuted, Unprovable, Verification
from .runs import Runs

if TYPE_CHECKING:
    from .preconditioner import Preconditioner
    from .taps import Tap

# Proofs of one module; every one takes about two steps.
MOST = 8


class Verifier:
    """Proves calls of a captured model before their first direction.

    A kind of call is a module, its mode, what is trained, the batch size, and which dimensions of the inputs are as
    large as the batch. The first `MOST` kinds of every module that is called from outside are proven.

    Attributes:
        is_proving: whether forwards and backwards are those of a proof now.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_proving = False
        self._is_on = is_on
        # What needs no look any more, exactly; and the kinds.
        self._settled: set[tuple] = set()
        self._kinds: dict[Tap, set[tuple]] = {}
        self._warned: set[str] = set()

    def forget(self) -> None:
        """Prove all kinds anew: the model has changed."""
        self._settled.clear()
        self._kinds.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls inside are not verified."""
        saved, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = saved

    def call(
        self,
        capture: Preconditioner,
        tap: Tap,
        arrays: Sequence[Tensor],
        args: tuple,
        kwargs: dict,
        forward: Callable[[], object],
    ) -> object:
        """The output of `forward`, a call that is verified first if its kind is new.

        Args:
            arrays: the tensors with dimensions among the arguments.

        Raises:
            Refuted: if the capture would give wrong gradients.
        """
        if not self._is_on:
            return forward()
        mode = tap, tap.module.training, *[parameter.requires_grad for parameter, _ in capture.guards.values()]
        exact = *mode, *[x.shape for x in arrays]
        if exact in self._settled or not _is_possible(arrays, capture):
            return forward()
        kinds, kind = self._kinds.setdefault(tap, set()), (*mode, *_sizes(arrays))
        if kind in kinds or len(kinds) >= MOST:
            if len(self._settled) > 1000:
                self._settled.clear()
            self._settled.add(exact)
            return forward()
        note, values, found, tolerance = "", {}, None, 0.0
        try:
            verification, values = self.proven(capture, tap, args, kwargs)
            note, tolerance = verification.note, verification.tolerance
        except NothingToProve:
            pass
        except Unprovable as error:
            note, found = str(error), error.output
        # Where the forward cannot be called again, the proof has made the only call. If this one fails, it says why.
        output = forward() if found is None or any(x.requires_grad for x in arrays) else found[0]
        kinds.add(kind)
        if note:
            self._warn(tap, note)
        if values:
            self._see_hooks(capture, tap, args, kwargs, output, values, tolerance)
        return output

    def _see_hooks(
        self,
        capture: Preconditioner,
        tap: Tap,
        args: tuple,
        kwargs: dict,
        output: object,
        values: dict[int, float],
        tolerance: float,
    ) -> None:
        """Verify the call with hooks, if they change its outputs; those that look on see what the user calls only."""
        outputs = tensors_in(output)
        norms = {n: outputs[n].detach().double().norm().item() for n in values}
        if any(abs(norms[n] - value) > tolerance * value for n, value in values.items()):
            try:
                self.proven(capture, tap, args, kwargs, hooks=True)
            except Unprovable as error:
                self._warn(tap, str(error))

    def proven(
        self, capture: Preconditioner, tap: Tap, args: tuple, kwargs: dict, hooks: bool = False
    ) -> tuple[Verification, dict[int, float]]:
        """The proof of a call, and the norms of its outputs if there are hooks that did not run.

        Hooks around the forwards of modules inside run if `hooks` says so, or without them the proof fails.

        Raises:
            Refuted, Unprovable: see `Proof.verification`.
        """
        self.is_proving = True
        try:
            with self.paused(), Runs(capture, tap, args, kwargs, hooks) as runs:
                proof = Proof(runs, tap, capture.batch_norm)
                return proof.verification(), proof.values if runs.leaves_hooks_out else {}
        except (Unprovable, Refuted):
            if not runs.leaves_hooks_out:
                raise
        finally:
            self.is_proving = False
        return self.proven(capture, tap, args, kwargs, hooks=True)

    def _warn(self, tap: Tap, reason: str) -> None:
        if reason in self._warned:
            return
        self._warned.add(reason)
        warnings.warn(
            f"the per-sample gradients of '{tap.name}' ({type(tap.module).__name__}) could not be verified: {reason}."
            " Training goes on; verify=False leaves the verification out",
            stacklevel=2,
        )


def _sizes(arrays: Sequence[Tensor]) -> list[int | tuple[bool, ...] | None]:
    """The batch size, and which dimensions are as large."""
    size = arrays[0].shape[0] if arrays else None
    return [size, *[tuple(n == size for n in x.shape) for x in arrays]]


def _is_possible(arrays: Sequence[Tensor], capture: Preconditioner) -> bool:
    """Whether a proof can run here and now: on numbers, outside of backwards, modes and CUDA graphs."""
    if _current_graph_task_id() != -1 or _get_current_dispatch_mode() is not None:
        return False
    if any(x.is_meta for x in [*arrays, *capture.model.parameters()]):
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
