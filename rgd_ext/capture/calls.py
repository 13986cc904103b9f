"""Calls of a captured model and of its parts between two backwards, which together say what one call does not."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from torch import Tensor, nn


class Calls:
    """What the forwards since the last backward were called with."""

    def __init__(self) -> None:
        self._of_one_sample: Counter[nn.Module] = Counter()
        # By their length, parts that were called with a list of indices, and those with as many samples as places.
        self._indices: dict[int, tuple[str, Tensor]] = {}
        self._squares: dict[int, str] = {}
        self._has_warned = False

    def note(self, module: nn.Module, name: str, x: Tensor, is_part: bool) -> None:
        """A call of the model, or of a part of it from outside the model's forward, with `x` as its first tensor.

        Raises:
            ValueError: if positions 0, 1, ... would be taken for samples.
        """
        size = x.shape[0]
        if size == 1:
            self._of_one_sample[module] += 1
        if not is_part or size == 1:
            return
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

    def warn_of_only_sample(self) -> None:
        """A direction is written of one sample, as all calls of the model are of one."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "batch_dim=None takes this call of the model for one sample, so the direction is the plain gradient:"
                " call the model and backward() for each sample inside `with handle.accumulate():`",
                stacklevel=2,
            )

    def end(self, batch_size: int | None) -> None:
        """A backward of `batch_size` samples has used them."""
        if not (self._of_one_sample or self._indices or self._squares):
            return
        often = [module for module, number in self._of_one_sample.items() if number > 1]
        if batch_size == 1 and often and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"several calls of {type(often[0]).__name__} with one sample each came before one backward: their"
                " gradients were added up as those of one sample, so the direction is the plain gradient. If they are"
                " different samples, call backward() for each, inside `with handle.accumulate():`; or the model once,"
                " with all of them",
                stacklevel=2,
            )
        for calls in (self._of_one_sample, self._indices, self._squares):
            calls.clear()


def _counts_up(x: Tensor) -> bool:
    if type(x) is not Tensor or x.is_meta:  # a fake tensor has no numbers either
        return False
    return torch.equal(x, torch.arange(len(x), dtype=x.dtype, device=x.device))
