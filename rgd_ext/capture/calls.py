"""Calls of a captured model and of its parts: the one under way, and those between two backwards."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .batch import Batch
from .native import NativeContext


class Calls:
    """The calls of a captured model, and of parts of it from outside of its forward.

    Attributes:
        batch: of the call under way, or None.
        number: of the call under way; how many there were so far.
        batch_size: of the call before, if it was known.
    """

    def __init__(self, native: NativeContext) -> None:
        self._native = native
        self.batch: Batch | None = None
        self.number = 0
        self.batch_size: int | None = None
        self._single = _SingleSamples()
        self._positions = _Positions()

    def run(self, batch: Batch, forward: Callable[[], object]) -> object:
        """The output of a forward, which is a call with `batch`."""
        self.batch, self.number = batch, self.number + 1
        self._native.begin_call(self.number, batch.size)
        try:
            return forward()
        finally:
            self.batch_size, self.batch = self.batch.size, None
            self._native.end_call()

    def resize(self, size: int) -> None:
        """The call under way has another number of samples than its first tensor told."""
        self.batch = replace(self.batch, size=size)  # type: ignore[type-var]  # as a call is under way
        self._native.begin_call(self.number, size)

    def note(self, module: nn.Module, name: str, x: Tensor, is_part: bool) -> None:
        """A call of the model, or of a part of it from outside, has `x` as its first tensor, samples first.

        Raises:
            ValueError: if positions 0, 1, ... would be taken for samples.
        """
        if x.shape[0] == 1:
            self._single.note(module)
        elif is_part:
            self._positions.note(name, x)

    def warn_of_only_sample(self) -> None:
        """Warn that the direction is that of one sample, since `batch_dim=None` makes every call one sample."""
        self._single.warn_of_only_sample()

    def end(self, batch_size: int) -> None:
        """Forget the calls that were noted, since a backward of `batch_size` samples has used them."""
        self._single.end(batch_size)
        self._positions.clear()


class _SingleSamples:
    """Calls with one sample each, whose gradients would be added up as those of one sample."""

    def __init__(self) -> None:
        self._numbers: Counter[nn.Module] = Counter()
        self._has_warned = False

    def note(self, module: nn.Module) -> None:
        self._numbers[module] += 1

    def warn_of_only_sample(self) -> None:
        self._warn(
            "batch_dim=None takes this call of the model for one sample, so the direction is the plain gradient:"
            " call the model and backward() for each sample inside `with handle.accumulate():`"
        )

    def end(self, batch_size: int) -> None:
        if not self._numbers:
            return
        often = [module for module, number in self._numbers.items() if number > 1]
        if batch_size == 1 and often:
            self._warn(
                f"several calls of {type(often[0]).__name__} with one sample each came before one backward: their"
                " gradients were added up as those of one sample, so the direction is the plain gradient. If they are"
                " different samples, call backward() for each, inside `with handle.accumulate():`; or the model once,"
                " with all of them"
            )
        self._numbers.clear()

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, stacklevel=2)


class _Positions:
    """Notices positions 0, 1, ... that would be taken for samples, in calls of parts of the model."""

    def __init__(self) -> None:
        # By their length.
        self._indices: dict[int, tuple[str, Tensor]] = {}
        self._squares: dict[int, str] = {}

    def note(self, name: str, x: Tensor) -> None:
        size = x.shape[0]
        if x.ndim > 1 and x.shape[1] == size:
            self._squares[size] = name
        elif x.ndim == 1 and not x.dtype.is_floating_point:
            self._indices[size] = name, x
        if size in self._squares and size in self._indices and _counts_up(self._indices[size][1]):
            raise ValueError(
                f"module '{self._indices[size][0]}' was called with the {size} positions 0, 1, ... and module"
                f" '{self._squares[size]}' with {size} samples of {size} places, both from outside the model's forward:"
                " positions would be taken for samples. Move the code that calls them into the forward of a module, and"
                " call that"
            )

    def clear(self) -> None:
        if self._indices or self._squares:
            self._indices.clear()
            self._squares.clear()


def _counts_up(x: Tensor) -> bool:
    if type(x) is not Tensor or x.is_meta:  # a fake tensor has no numbers either
        return False
    return torch.equal(x, torch.arange(len(x), dtype=x.dtype, device=x.device))
