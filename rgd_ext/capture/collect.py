"""Per-sample gradients of backwards that leave `.grad` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .captured import CapturedGradients
from .dry_run import unchanged_buffers
from .factors import Dense
from .preconditioner import live_handle, precondition


@contextmanager
def collecting(model: nn.Module, verify: bool = True) -> Iterator[Callable[[Tensor, int], CapturedGradients]]:
    """Capture `model` for a while, or use the capture it has, without any effect on either.

    With `verify` a capture for a while is verified.

    Yields a function that runs the backward of a loss of B samples, given B, and returns their g_i = B h_i, with the
    trainable parameters in the order of `model.parameters()`.

    Raises:
        ValueError: if the model cannot be captured, or parts of it are captured already, or it is with another
            `batch_dim` than 0.
        RuntimeError: if its capture is paused, or inside a torch.func transform.
    """
    existing = live_handle(model)
    if existing is not None and existing.batch_dim != 0:
        raise ValueError(
            f"the model is captured with batch_dim={existing.batch_dim}, and here its samples lie along dimension 0:"
            " call .remove() on the handle, and give it a forward that takes samples first"
        )
    handle = existing or precondition(model, verify=verify)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss: Tensor, batch_size: int) -> CapturedGradients:
        loss.backward(inputs=parameters)
        part = parts.pop() if parts else {}
        return CapturedGradients([part.get(p) or Dense(p.new_zeros(batch_size, *p.shape)) for p in parameters])

    try:
        with torch.enable_grad():
            is_recording = handle.recording()
        if not is_recording:
            raise RuntimeError(
                "the model's capture records nothing here: leave the `with handle.paused():` block, or the torch.func"
                " transform, first"
            )
        with unchanged_buffers(model), handle.collect() as parts:
            yield gradients
    finally:
        if existing is None:
            handle.remove()
