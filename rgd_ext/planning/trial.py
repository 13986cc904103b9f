"""Forwards and backwards of a model that leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..contributions.rates import now
from ..nests import modules_in, tensors_in


class SavedBuffers:
    """The buffers of a model, and their values.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module._buffers, name, buffer, buffer.clone())
            for module in modules_in(model)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its buffers back, with the values that they had."""
        for owner, name, buffer, before in self._buffers:
            owner[name] = buffer
            if not torch.equal(buffer, before):
                buffer.copy_(before)


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """A context that gives the model its buffers back when it ends, with the values that they have now."""
    saved = SavedBuffers(model)
    try:
        yield
    finally:
        saved.restore()


def dry_run(model: nn.Module, args: tuple, kwargs: dict, times: int) -> float:
    """The seconds of the fastest of some forwards and backwards of the sum of the model's outputs.

    Afterwards `.grad`, buffers and the states of random number generators are as before.

    Args:
        model: the model.
        args, kwargs: what it is called with.
        times: the number of forwards and backwards.

    Raises:
        ValueError: if no output depends on trainable parameters.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    devices = {p.device for p in parameters if p.is_cuda}
    saved = [p.grad for p in parameters]
    with torch.random.fork_rng(devices), unchanged_buffers(model):
        try:
            return min(_seconds(model, args, kwargs, parameters, devices) for _ in range(times))
        finally:
            for parameter, grad in zip(parameters, saved, strict=True):
                parameter.grad = grad


def _seconds(model: nn.Module, args: tuple, kwargs: dict, parameters: list[nn.Parameter], devices: set) -> float:
    for parameter in parameters:
        parameter.grad = None
    begin = now(devices)
    outputs = [t for t in tensors_in(model(*args, **kwargs)) if t.requires_grad]
    if not outputs:
        raise ValueError("no output of the model depends on its trainable parameters: there is nothing to plan")
    torch.autograd.backward([output.sum() for output in outputs], inputs=parameters)
    return now(devices) - begin
