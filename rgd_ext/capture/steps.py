"""Steps of optimizers along a direction that is collected and not written yet, which are refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from .unions import BatchUnion

_NOT_WRITTEN = (
    "an optimizer's step along a direction that is not written yet: handle.defer() has collected its backwards. Call"
    " handle.write() before the step, and before gradients are clipped or unscaled; handle.drop() forgets them"
)
_IN_BLOCK = (
    "an optimizer's step inside a block of handle.accumulate(), which writes the direction of the backwards collected"
    " when it ends: call step() after the block"
)
# A list, as a rule empty, since small models would wait for a WeakSet.
_unions: list[weakref.ref[BatchUnion]] = []


def watch(union: BatchUnion) -> None:
    """Refuse steps of torch's optimizers along the direction of `union`, as long as that holds anything."""
    _unions.append(weakref.ref(union, _unions.remove))
    _watch_steps()


@cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_checked)


def unwritten(optimizer: Optimizer) -> list[BatchUnion]:
    """Unions with contributions to parameters of `optimizer`."""
    found = [union for reference in _unions if (union := reference())]
    if not found:
        return found
    own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return [union for union in found if not own.isdisjoint(union.parameters())]


def _checked(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The arguments of a step with a closure that is followed by the check; without one, check now."""
    if kwargs.get("closure") is not None:
        return args, kwargs | {"closure": _followed(kwargs["closure"], optimizer)}
    if len(args) > 1 and args[1] is not None:  # after the optimizer
        return (args[0], _followed(args[1], optimizer), *args[2:]), kwargs
    _check(optimizer)
    return None


def _followed(closure: Callable[[], object], optimizer: Optimizer) -> Callable[[], object]:
    def followed() -> object:
        loss = closure()
        _check(optimizer)
        return loss

    return followed


def _check(optimizer: Optimizer) -> None:
    for union in unwritten(optimizer):
        raise RuntimeError(_NOT_WRITTEN if union.is_deferred else _IN_BLOCK)
