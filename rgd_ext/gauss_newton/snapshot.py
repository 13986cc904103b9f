"""What evaluations of a closure change beside its result, put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..capture.verification.random_numbers import RandomNumbers
from ..planning.trial import SavedBuffers


class Snapshot:
    """The buffers of a model, and the states of the random number generators that its forwards draw from.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = SavedBuffers(model)
        self._random = RandomNumbers({p.device for p in model.parameters() if p.is_cuda}, ())

    def restore(self) -> None:
        """Put all of them back, with the same bits."""
        self._random.rewind()
        self._buffers.restore()


class Position:
    """The values of parameters, which steps start from.

    Args:
        parameters: the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def move(self, step: Sequence[Tensor]) -> bool:
        """Give the parameters their values less `step`; returns whether one of them has changed."""
        has_moved = False
        for parameter, value, part in zip(self._parameters, self._values, step, strict=True):
            parameter.copy_(value - part)
            has_moved = has_moved or not torch.equal(parameter, value)
        return has_moved

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their values back, with the same bits."""
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.copy_(value)
