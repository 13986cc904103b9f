"""What captures have to say before an optimizer steps: errors, and warnings."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class StepCheck(ABC):
    """What is to be checked before steps of the optimizers of some parameters."""

    @abstractmethod
    def stepped(self) -> Sequence[nn.Parameter]:
        """The parameters that a step concerns, as optimizers have them; none if there is nothing to check."""

    @abstractmethod
    def check(self) -> None:
        """Raise an error, or warn, before a step of one of them."""

    @abstractmethod
    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget what was found in earlier backwards: the gradients of these parameters are set to zero."""


# A list, which is short, since small models would wait for a WeakSet.
_checks: list[weakref.ref[StepCheck]] = []


def check_steps(check: StepCheck) -> None:
    """From now on, as long as it lives, ask `check` before the steps of torch's optimizers."""
    _checks.append(weakref.ref(check, _checks.remove))
    _hook_steps()


@cache
def _hook_steps() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _checks_of(optimizer: Optimizer) -> list[StepCheck]:
    """The checks that concern parameters of `optimizer`."""
    found = [(check, stepped) for reference in _checks if (check := reference()) and (stepped := check.stepped())]
    if not found:
        return []
    own = _parameters_of(optimizer)
    return [check for check, stepped in found if not own.isdisjoint(stepped)]


def forget_gradients(optimizer: Optimizer) -> None:
    """Have the checks forget the gradients of the parameters of `optimizer`, which are set to zero."""
    for check in _checks_of(optimizer):
        check.forget(_parameters_of(optimizer))


def _parameters_of(optimizer: Optimizer) -> set[nn.Parameter]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


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
    for check in _checks_of(optimizer):
        check.check()
