"""The buffers of a model, which become those of rank 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .group import Group


class SharedBuffers:
    """The buffers that a model has at its capture.

    One that a process has replaced by a buffer of another shape or dtype, as a cache may be, is its own from then on.

    Args:
        model: the model, or None if each process keeps its buffers.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._kinds = {name: _kind(buffer) for name, buffer in self._buffers().items()}

    def _buffers(self) -> dict[str, Tensor]:
        return {} if self._model is None else dict(self._model.named_buffers())

    def flags(self) -> list[bool]:
        """For each buffer, whether it may not be shared."""
        buffers = self._buffers()
        return [name not in buffers or _kind(buffers[name]) != kind for name, kind in self._kinds.items()]

    def share(self, group: Group, flags: Sequence[bool]) -> None:
        """Overwrite the buffers by those of rank 0.

        Args:
            group: the processes.
            flags: of `flags`, where any process has them set.
        """
        buffers = self._buffers()
        group.broadcast("buffers", [buffers[name] for name, own in zip(self._kinds, flags, strict=True) if not own])


def _kind(buffer: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return buffer.shape, buffer.dtype, buffer.device
