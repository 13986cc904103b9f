"""Per-sample gradients from backwards that do not change `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..contributions.ledger import Contributions
from ..planning.trial import unchanged_buffers
from .captures import capture_alone, live_handle
from .wrappers import NEEDS_WHOLE, check_not_sharded


@contextmanager
def collecting(model: nn.Module, verify: bool = True) -> Iterator[Callable[[Tensor, int], Contributions]]:
    """A context in which the per-sample gradients of a model can be computed; it leaves the model as it was.

    The model is captured until the context ends, or the capture that it has is used.

    Args:
        model: the model.
        verify: whether a capture made here is verified.

    Yields:
        A function of a loss and its number of samples B. It runs the backward of the loss, and returns g_i = B h_i of
        the samples, with the trainable parameters in the order of `model.parameters()`.

    Raises:
        ValueError: if the model cannot be captured, if parts of it are captured already, or if the model is captured
            with another `batch_dim` than 0, or sharded.
        RuntimeError: if its capture is paused, or inside a torch.func transform.
    """
    existing = live_handle(model)
    if existing is not None:
        check_not_sharded(model, NEEDS_WHOLE)
        if existing.batch_dim != 0:
            raise ValueError(
                f"the model is captured with batch_dim={existing.batch_dim}, and here its samples lie along dimension"
                " 0: call .remove() on the handle, and give it a forward that takes samples first"
            )
    handle = existing or capture_alone(model, verify=verify)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss: Tensor, batch_size: int) -> Contributions:
        loss.backward(inputs=parameters)
        found = parts.pop() if parts else Contributions(batch_size)
        found.arrange(parameters)
        return found

    try:
        with torch.enable_grad():
            is_recording = handle.is_recording()
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
