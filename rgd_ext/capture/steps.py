"""Optimizer steps are refused as long as the direction of collected backwards is not written."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, wraps

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_NOT_WRITTEN = (
    "an optimizer's step along a direction that is not written yet: handle.defer() has collected its backwards. Call"
    " handle.write() before the step, and before gradients are clipped or unscaled; handle.drop() forgets them"
)
_IN_BLOCK = (
    "an optimizer's step inside a block of handle.accumulate(), which writes the direction of the backwards collected"
    " when it ends: call step() after the block"
)


class PendingDirection(ABC):
    """A direction whose contributions have been collected, and which is not written yet."""

    @property
    @abstractmethod
    def is_deferred(self) -> bool:
        """Whether `handle.write()` will write it, and not the end of a block."""

    @abstractmethod
    def stepped(self) -> Sequence[nn.Parameter]:
        """The parameters that have contributions, as optimizers step them."""

    @abstractmethod
    def drop(self) -> None:
        """Forget the contributions."""


# A list, which is nearly always empty, since small models would wait for a WeakSet.
_pending: list[weakref.ref[PendingDirection]] = []


def refuse_steps(direction: PendingDirection) -> None:
    """Refuse steps of torch's optimizers as long as `direction` has contributions to their parameters."""
    _pending.append(weakref.ref(direction, _pending.remove))
    _hook_steps()


@cache
def _hook_steps() -> None:
    register_optimizer_step_pre_hook(_before_step)


def pending_directions(optimizer: Optimizer) -> list[PendingDirection]:
    """The pending directions that have contributions to parameters of `optimizer`."""
    found = [direction for reference in _pending if (direction := reference())]
    if not found:
        return found
    own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return [direction for direction in found if not own.isdisjoint(direction.stepped())]


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Check now; or, for a step with a closure, return its arguments with a closure that checks after the backward."""
    if callable(kwargs.get("closure")):  # an optimizer refuses what is none
        return args, kwargs | {"closure": _with_check(kwargs["closure"], optimizer)}
    if len(args) > 1 and callable(args[1]):  # after the optimizer
        return (args[0], _with_check(args[1], optimizer), *args[2:]), kwargs
    _check(optimizer)
    return None


def _with_check(closure: Callable[[], object], optimizer: Optimizer) -> Callable[[], object]:
    @wraps(closure)
    def checked_closure() -> object:
        loss = closure()
        _check(optimizer)
        return loss

    return checked_closure


def _check(optimizer: Optimizer) -> None:
    for direction in pending_directions(optimizer):
        raise RuntimeError(_NOT_WRITTEN if direction.is_deferred else _IN_BLOCK)
