"""Directions are added to `.grad`, with a warning before a step along the sum of several."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .steps import StepCheck, check_steps

_SEVERAL = (
    "rgd_ext: this step of an optimizer goes along a sum of {count} directions, since {count} backwards have each added"
    " one to .grad. The sum is not the direction of all their samples. For that one, run all backwards of a step inside"
    " one block `with rgd_ext.handle_of(model).accumulate():`, where model is the captured module; with a trainer, use"
    " RGDTrainer or RGDCallback of rgd_ext.integrations, or defer() and write() of the handle. If they are of different"
    " steps, call optimizer.zero_grad() before each; p.grad.data.zero_() is not seen. This warning comes once for each"
    " capture"
)

# What is known of a gradient that was written: a weak reference to it; its version after the last direction was added,
# which counts changes in place; and how many directions it consists of.
_Written: TypeAlias = tuple[Callable[[], Tensor | None], int, int]
_NOTHING: _Written = (lambda: None), 0, 0


class GradWriter(StepCheck):
    """Adds directions to `.grad`.

    It warns once before a step along the sum of several, which users of gradient accumulation take for the direction
    of the whole batch. Such a sum is noticed only where nothing else has changed the gradient in between. Changes of
    `grad.data` leave no trace, so that it warns after `grad.data.zero_()`, too. A gradient of zeros does not tell: it
    may be the direction of samples without a loss, and a sum with that is not the direction of the union either.

    Args:
        is_additive: whether such sums are the direction of the whole batch, so that there is nothing to warn of.
    """

    def __init__(self, is_additive: bool) -> None:
        self._is_quiet, self._is_registered = is_additive, False
        # By the ids of parameters: what was written last, and the parameters that have several directions.
        self._written: dict[int, _Written] = {}
        self._sums: dict[int, nn.Parameter] = {}

    def add(self, parameters: list[nn.Parameter], direction: list[Tensor]) -> None:
        """Add to the gradient of each parameter its part of a direction."""
        # Inference tensors, as `handle.write()` leaves them under torch.inference_mode, have no versions.
        is_watching = not self._is_quiet and not torch.is_inference_mode_enabled()
        for parameter, step in zip(parameters, direction, strict=True):
            count, grad = 1, parameter.grad
            if grad is None:
                # A view made here could not be changed in place where autograd records.
                parameter.grad = grad = step.detach() if step._is_view() else step
            else:
                count += self._count_in(parameter, grad)
                if grad.is_sparse and not step.is_sparse:
                    parameter.grad = grad = step + grad
                else:
                    grad += step
            if is_watching:
                self._written[id(parameter)] = weakref.ref(grad), grad._version, count
                if count > 1 or self._sums:
                    self._watch(parameter, count)

    def _count_in(self, parameter: nn.Parameter, grad: Tensor) -> int:
        """How many directions a gradient consists of; 0 if something else has changed it since."""
        written, version, count = self._written.get(id(parameter), _NOTHING)
        return count if written() is grad and version == grad._version else 0

    def _watch(self, parameter: nn.Parameter, count: int) -> None:
        """Warn before steps of the parameter if its gradient consists of several directions."""
        if count == 1:
            self._sums.pop(id(parameter), None)
            return
        self._sums[id(parameter)] = parameter
        if not self._is_registered:
            self._is_registered = True
            check_steps(self)

    def stepped(self) -> Sequence[nn.Parameter]:
        # Where gradients are clipped or unscaled they change, but stay where they are.
        return [p for p in self._sums.values() if p.grad is not None and p.grad is self._written[id(p)][0]()]

    def check(self) -> None:
        most = max(self._written[id(parameter)][2] for parameter in self.stepped())
        self._is_quiet = True
        self._written, self._sums = {}, {}
        # Of whoever calls step(), behind this method, `_check` and `_before_step` of steps.py, and torch's wrapper.
        warnings.warn(_SEVERAL.format(count=most), stacklevel=5)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            self._written.pop(id(parameter), None)
            self._sums.pop(id(parameter), None)
