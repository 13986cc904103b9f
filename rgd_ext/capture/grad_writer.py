"""Directions are added to `.grad`, with a warning before a step along the sum of several."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .steps import StepCheck, check_steps

_SEVERAL = (
    "an optimizer's step along the sum of {count} directions: {count} backwards have each added one to .grad, which is"
    " not the direction of all their samples. For that one run them inside of"
    " `with rgd_ext.handle_of(model).accumulate():`; with a trainer, use RGDTrainer or RGDCallback of"
    " rgd_ext.integrations, or defer() and write() of the handle. If they are of different steps, call"
    " optimizer.zero_grad() before each. This warning comes once for each capture"
)


class GradWriter(StepCheck):
    """Adds directions to `.grad`.

    It warns once before a step along the sum of several, which users of gradient accumulation take for the direction
    of the whole batch. Such a sum is noticed only where nothing else has changed the gradients in between.

    Args:
        is_additive: whether such sums are the direction of the whole batch, so that there is nothing to warn of.
    """

    def __init__(self, is_additive: bool) -> None:
        self._is_quiet, self._is_registered = is_additive, False
        # The directions in `.grad`, the parameters of the last one, and the gradient of the first of these, which tells
        # whether all were left alone: to look at each would take longer than to write a small one.
        self._count = 0
        self._parameters: list[nn.Parameter] = []
        self._grad: Callable[[], Tensor | None] = lambda: None
        self._version = 0

    def add(self, parameters: list[nn.Parameter], direction: list[Tensor]) -> None:
        """Add to the gradient of each parameter its part of a direction."""
        self._count = self._count + 1 if self._adds_up(parameters) else 1
        for parameter, step in zip(parameters, direction, strict=True):
            if parameter.grad is None:
                # A view made here could not be changed in place where autograd records.
                parameter.grad = step.detach() if step._is_view() else step
            elif parameter.grad.is_sparse and not step.is_sparse:
                parameter.grad = step + parameter.grad
            else:
                parameter.grad += step
        self._parameters = parameters
        if parameters and (first := parameters[0].grad) is not None:
            self._grad, self._version = weakref.ref(first), _version(first)
        if self._count > 1 and not self._is_quiet and not self._is_registered:
            self._is_registered = True
            check_steps(self)

    def _adds_up(self, parameters: list[nn.Parameter]) -> bool:
        """Whether the gradients of some parameters have the last direction, as it was written."""
        grad = self._grad_now()
        if grad is None or _version(grad) != self._version:
            return False
        last = set(self._parameters)
        return any(parameter in last and parameter.grad is not None for parameter in parameters)

    def _grad_now(self) -> Tensor | None:
        """The gradient that the last direction was written to, if it is still there."""
        grad = self._parameters[0].grad if self._parameters else None
        return grad if grad is self._grad() else None

    def stepped(self) -> Sequence[nn.Parameter]:
        # Where gradients are clipped or unscaled they change, but stay where they are.
        return self._parameters if self._count > 1 and not self._is_quiet and self._grad_now() is not None else ()

    def check(self) -> None:
        self._is_quiet = True
        # Of whoever calls step(), behind this method, `_check` and `_before_step` of steps.py, and torch's wrapper.
        warnings.warn(_SEVERAL.format(count=self._count), stacklevel=5)

    def drop(self) -> None:
        self._count = 0


def _version(tensor: Tensor) -> int:
    # An inference tensor, as `handle.write()` leaves it under torch.inference_mode, counts no versions.
    return 0 if tensor.is_inference() else tensor._version
