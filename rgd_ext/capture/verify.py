"""Verification on demand."""

from __future__ import annotations

import torch
from torch import nn

from .preconditioner import Preconditioner, handle_of, precondition
from .proof import Refused, Unprovable, Verification
from .runs import Call
from .taps import Tap


def verify(model: nn.Module, *args, **kwargs) -> Verification:
    """Prove on a batch that the capture gives every sample its own gradient: without a loss, and without a trace.

    With random cotangents v of the outputs, the samples' contributions must add up to autograd's gradient of <v, out>,
    parameter by parameter, and those of the first and the last sample must be what autograd gives for each of them
    alone. `precondition` and `RGD` do the same before their first direction, unless `verify=False`.

    Args:
        model: captured or not; or a part of a captured model.
        args, kwargs: a batch as the model takes it.

    Returns:
        What was compared, and the largest error; it prints well.

    Raises:
        ValueError: if the capture would give wrong gradients, naming the parameter, the module, the error and a remedy;
            or if the model cannot be captured.
        RuntimeError: if nothing can be proven, saying why.
        TypeError: if `model` is not a module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> verification = rgd_ext.verify(model, torch.randn(16, 4))
        >>> verification.parameters, verification.samples
        (4, (0, 15))
    """
    existing = handle_of(model)
    if existing is not None:
        return _verification(*existing, args, kwargs)
    with precondition(model, verify=False) as handle:
        return _verification(handle, handle.tap_of(model), args, kwargs)


def _verification(capture: Preconditioner, tap: Tap | None, args: tuple, kwargs: dict) -> Verification:
    if tap is None:
        kind = type(capture.model).__name__
        raise ValueError(f"the model ({kind}) has no forward: pass the part of it that is called")
    with torch.enable_grad():
        if not capture.recording():
            raise RuntimeError(
                "the model's capture records nothing here: leave `with handle.paused():` or the torch.func transform"
            )
        try:
            return capture.verifier.verification(Call.of(tap, args, kwargs))
        except Refused as error:
            raise error.__cause__ from None
        except Unprovable as error:
            raise RuntimeError(f"nothing can be proven of '{tap.name}': {error}") from error
