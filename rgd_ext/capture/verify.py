"""Verification on demand."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .captures import capture_alone, handle_of
from .findings import BackwardFailed, ForwardFailed, Unprovable, Verification
from .handle import Preconditioner
from .model_call import ModelCall
from .recorders.recorder import Recorder
from .wrappers import NEEDS_WHOLE, check_not_sharded


def verify(model: nn.Module, *args: Any, batch_dim: int | None = 0, **kwargs: Any) -> Verification:
    """Prove on a batch that the capture gives every sample its own gradient. Needs no loss and leaves no trace.

    With random cotangents v of the outputs, the samples' contributions must add up to autograd's gradient of <v, out>
    for every parameter, also with a random weight per sample; and those of the first and the last sample must be what
    autograd gives for each of them alone. `precondition` and `RGD` do the same before their first direction, unless
    `verify=False`.

    Args:
        model: captured or not; or a part of a captured model. One that is not captured is captured for this call, with
            `precondition`'s defaults.
        args, kwargs: a batch as the model takes it: samples along dimension `batch_dim` of the first tensor.
        batch_dim: of `precondition`; a model that is captured already has it from there.

    Returns:
        What was compared, and the largest error; printed, a line.

    Raises:
        ValueError: if the capture would give wrong gradients, naming the parameter, the module, the error and a remedy;
            or if the model cannot be captured, or is sharded.
        RuntimeError: if nothing can be proven, saying why, or while nothing is recorded.
        TypeError: if `model` is not a module.
        Exception: of the model's own forward or backward.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> verification = rgd_ext.verify(model, torch.randn(16, 4))
        >>> verification.parameters, verification.samples
        (4, (0, 15))
    """
    existing = handle_of(model) if isinstance(model, nn.Module) else None
    if existing is not None:
        check_not_sharded(model, NEEDS_WHOLE)
        if batch_dim not in (0, existing.batch_dim):
            raise ValueError(
                f"batch_dim is {batch_dim}, but the model was captured with batch_dim={existing.batch_dim}: leave it"
                " out, or capture the model again with the other"
            )
        return _verification(existing, existing.recorder_of(model), args, kwargs)
    with capture_alone(model, verify=False, batch_dim=batch_dim) as handle:
        return _verification(handle, handle.recorder_of(model), args, kwargs)


def _verification(
    capture: Preconditioner, recorder: Recorder | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Verification:
    if recorder is None:
        kind = type(capture.model).__name__
        raise ValueError(f"the model ({kind}) has no forward: pass the part of it that is called")
    with torch.enable_grad():
        if not capture.is_recording():
            raise RuntimeError(
                "the model's capture records nothing here: leave `with handle.paused():` or the torch.func transform"
            )
        try:
            return _of_both_sides(capture, ModelCall.of(recorder, args, kwargs))
        except (ForwardFailed, BackwardFailed) as error:
            raise (error.__cause__ or error) from None
        except Unprovable as error:
            raise RuntimeError(f"nothing can be proven of '{recorder.name}': {error}") from error


def _of_both_sides(capture: Preconditioner, call: ModelCall) -> Verification:
    first = capture.verifier.verification(call)
    if not first.is_open:
        return first
    try:
        return max(first, capture.verifier.verification(call, side=1), key=attrgetter("largest_error"))
    except Unprovable:
        return first
