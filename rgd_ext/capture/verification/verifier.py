"""Verification of the calls of a captured model, before they are made."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ...nests import tensors_in
from ..context import CaptureContext
from ..findings import (
    BackwardFailed,
    NotFinite,
    NothingToProve,
    NotRepeatable,
    Unprovable,
    Verification,
    WrongGradients,
    tolerance_of,
)
from ..model_call import ModelCall, run
from ..recorders.recorder import Recorder
from .kinds import Kinds
from .proof import Proof
from .runs import Runs
from .sketch import norm, sketch


class _Outcome(NamedTuple):
    """The outcome of an attempt to verify a call.

    Attributes:
        verification: the report, if the attempt succeeded.
        note: what was not verified and why, or empty.
        is_open: whether another call of the kind may show more.
        cause: why the forward cannot be called another time, if it cannot.
    """

    verification: Verification | None = None
    note: str = ""
    is_open: bool = False
    cause: NotRepeatable | None = None


class Verifier:
    """Proves calls of a captured model before their first direction, those that `Kinds` chooses.

    Args:
        context: the capture of the model.
        is_on: whether calls are verified.
    """

    def __init__(self, context: CaptureContext, is_on: bool) -> None:
        self._context, self._is_on = context, is_on
        self._kinds = Kinds(context)
        self._warned: set[tuple[Recorder, str]] = set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls inside are not verified."""
        saved, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = saved

    def run(self, call: ModelCall) -> object:
        """The output of a call, which is verified first if its kind is new.

        Raises:
            WrongGradients: if the capture would give wrong gradients.
        """
        kind = self._kinds.due(call) if self._is_on else None
        if kind is None:
            return run(call)
        try:
            outcome = self._attempt(call, side=self._kinds.side(kind))
            output = self._output_after(call, outcome)
        except Exception:
            self._kinds.refuse(kind)
            raise
        self._kinds.remember(call.recorder, kind, outcome.is_open)
        if outcome.note:  # now, since a forward that fails says enough
            self._warn(call.recorder, outcome)
        return output

    def _output_after(self, call: ModelCall, outcome: _Outcome) -> object:
        if outcome.cause is not None:
            return self._output_of_only_call(call, outcome.cause)
        if outcome.verification is None or not outcome.verification.outputs:
            return run(call)
        buffers = [(x, x.clone()) for x in self._context.model.buffers()]
        output = run(call)
        try:
            self._check_hooks(call, output, outcome.verification)
        except WrongGradients:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            raise
        return output

    def _attempt(self, call: ModelCall, hooks: bool = False, side: int = 0) -> _Outcome:
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

    def verification(self, call: ModelCall, hooks: bool = False, side: int = 0) -> Verification:
        """The proof of a call.

        Autocast is off, because rounding hides errors, unless the proof cannot be carried out without it. Hooks around
        the forwards of modules inside run if it fails without them.

        Raises:
            WrongGradients, Unprovable: see `Proof.verification`.
        """
        autocast = False
        while True:
            try:
                with self.paused(), self._context.proving(), Runs(call, hooks, autocast, side) as runs:
                    return Proof(runs).verification()
            except (NotFinite, NotRepeatable):  # noqa: PERF203 (there are three attempts at most)
                raise
            except (Unprovable, WrongGradients) as error:
                if runs.leaves_hooks_out:
                    hooks = True
                elif runs.environment.lacks_autocast and isinstance(error, Unprovable):
                    autocast = True
                else:
                    raise

    def _output_of_only_call(self, call: ModelCall, cause: NotRepeatable) -> object:
        """Where the forward cannot be called again, the proof has made the only call."""
        if cause.output is not None and not any(x.requires_grad for x in call.arrays):
            return cause.output[0]
        try:
            return run(call)
        except Exception as error:
            name, kind = call.recorder.name, type(call.recorder.module).__name__
            raise RuntimeError(
                f"the forward of '{name}' ({kind}) can be called only once, and its verification calls it several times"
                f" ({type(error).__name__}: {error}): pass verify=False"
            ) from error

    def _check_hooks(self, call: ModelCall, output: object, verification: Verification) -> None:
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
                    self._warn(call.recorder, outcome)
                return

    def _warn(self, recorder: Recorder, outcome: _Outcome) -> None:
        if (recorder, outcome.note) in self._warned:
            return
        self._warned.add((recorder, outcome.note))
        extent = "" if outcome.verification is None else " completely"
        kind = type(recorder.module).__name__
        warnings.warn(
            f"the per-sample gradients of '{recorder.name}' ({kind}) could not be verified{extent}:"
            f" {outcome.note}. They are used all the same; verify=False leaves the verification out",
            stacklevel=2,
        )
