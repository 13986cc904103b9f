"""The parameters of a captured model: their names, their places, and the gradients that reach them past the capture."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..metric import ParameterVector
from ..nests import modules_in
from .native import GUARD_HOOKS, NativeContext, guard
from .parameter_vector import by_parameter
from .wrappers import check_not_sharded, check_not_wrapped

T = TypeVar("T")
UNKNOWN = "?"
# A parameter's place: the module that owns it, and its name there.
Place = tuple[nn.Module, str]


class WatchedParameters:
    """The trainable parameters of a captured model.

    Args:
        model: the captured model.
        native: notes which parameters are watched.
        refuse: called with a parameter if a gradient reaches it past the capture.
    """

    def __init__(self, model: nn.Module, native: NativeContext, refuse: Callable[[nn.Parameter], None]) -> None:
        self._model, self._native = model, native
        self._refuse = refuse
        self._names = {p: name for name, p in model.named_parameters()}
        # By its id, every trainable parameter and its hook: the hash of a tensor is a call of Python.
        self._guards: dict[int, tuple[nn.Parameter, object]] = {}
        self._places: set[Place] = set()

    def watch_all(self, places: Iterable[Place]) -> None:
        """Watch what is trainable now; others may come to these places later."""
        self._places = set(places)
        for parameter in filter(lambda p: p.requires_grad and p.numel(), self._names):
            self.watch(parameter)

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._guards

    def __iter__(self):
        return iter([parameter for parameter, _ in self._guards.values()])

    def watch(self, parameter: nn.Parameter) -> None:
        """Notice gradients that reach `parameter` past the capture."""
        if parameter in self:
            return
        self._check_hooks(parameter, 0)
        if parameter not in self._names:  # as after load_state_dict(assign=True)
            check_not_sharded(self._model)
            self._names = {p: name for name, p in self._model.named_parameters()}
            for replaced in self._guards.keys() - set(map(id, self._names)):
                self._forget(*self._guards.pop(replaced))
        # Weak: the garbage collector does not see into a guard that was compiled.
        callback = partial(_on_gradient, weakref.ref(self), id(parameter))
        self._guards[id(parameter)] = parameter, guard(parameter, callback)
        self._native.watch(parameter)

    def refuse(self, parameter: int) -> None:
        """A gradient has reached the parameter with this id."""
        self._refuse(self._guards[parameter][0])

    def _forget(self, parameter: nn.Parameter, hook) -> None:
        hook.remove()
        self._native.unwatch(parameter)

    def release(self) -> None:
        """Watch no parameter any more."""
        for parameter, hook in self._guards.values():
            self._forget(parameter, hook)
        self._guards = {}

    def name_of(self, parameter: Tensor) -> str:
        """Its name in the model, or `UNKNOWN` for one that was replaced since."""
        name = self._names.get(parameter)  # type: ignore[call-overload]  # None for what is no Parameter
        return name or next((name for name, p in self._model.named_parameters() if p is parameter), UNKNOWN)

    def vector(self, vectors: ParameterVector) -> dict[nn.Parameter, Tensor]:
        """The part of a vector of the parameter space that belongs to each parameter; raises as `by_parameter`."""
        return by_parameter(self._model, vectors)

    def in_model_order(self, items: Iterable[T], name_of: Callable[[T], str]) -> list[T]:
        """What belongs to parameters of these names, as the model lists its parameters."""
        order = {name: number for number, name in enumerate(self._names.values())}
        return sorted(items, key=lambda item: order.get(name_of(item), len(order)))

    def captures(self, parameter: Tensor) -> bool:
        """Whether the gradient of `parameter` is written by the capture."""
        return parameter in self._names or any(owner._parameters.get(key) is parameter for owner, key in self._places)

    def admit_newcomers(self) -> None:
        """Watch parameters that were frozen, or took the place of a captured one, since the call before.

        Raises:
            ValueError: for one in a place that nothing watches, and for a model that was wrapped since.
        """
        for module in modules_in(self._model):
            if type(module) is DistributedDataParallel:
                check_not_wrapped(self._model)
            for key, parameter in module._parameters.items():
                if id(parameter) not in self._guards and parameter is not None and parameter.requires_grad:
                    self._admit(module, key, parameter)

    def _admit(self, module: nn.Module, key: str, newcomer: Tensor) -> None:
        if not isinstance(newcomer, nn.Parameter) or newcomer.numel() == 0:  # the others are of functional_call
            return
        if (module, key) not in self._places:
            raise ValueError(
                f"parameter '{self.name_of(newcomer)}' came into the model after its capture, so backward would write"
                " its plain gradient: call .remove() on the handle and capture the model again"
            )
        self.watch(newcomer)

    def check_unhooked(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raise ValueError if one has gradient hooks of somebody else."""
        for parameter in parameters:
            # Before the call, for which small models would wait.
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                self._check_hooks(parameter, GUARD_HOOKS)

    def _check_hooks(self, parameter: nn.Parameter, own: int) -> None:
        if len(parameter._backward_hooks or ()) > own or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"parameter '{self.name_of(parameter)}' has gradient hooks, which would run before its"
                " direction is written: remove them and change .grad after backward() instead"
            )


def _on_gradient(watched: weakref.ref[WatchedParameters], parameter: int, grad: Tensor | None) -> None:
    parameters = watched()
    if grad is not None and parameters is not None:
        parameters.refuse(parameter)
