"""The parameters of a captured model: their names, their places, and the gradients that reach them past the capture."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import ModelParameters
from ..metric import ParameterVector
from ..nests import modules_in
from .native import GUARD_HOOKS, NativeContext, guard
from .parameter_vector import by_parameter
from .wrappers import check_not_sharded, check_not_wrapped

T = TypeVar("T")
UNKNOWN = "?"
_NEWCOMER = (
    "a parameter of shape {} came into the sharded model after its capture: shard the model first. Call .remove() on"
    " the handle, and capture the model again"
)
# A parameter's place: the module that owns it, and its name there.
Place = tuple[nn.Module, str]


class WatchedParameters:
    """The trainable parameters of a captured model.

    Args:
        parameters: those of the model.
        native: notes which parameters are watched.
        refuse: called with a parameter if a gradient reaches it past the capture.

    Attributes:
        is_sharded: whether each process has shards of the parameters.
    """

    def __init__(
        self, parameters: ModelParameters, native: NativeContext, refuse: Callable[[nn.Parameter], None]
    ) -> None:
        self._parameters, self._native, self.is_sharded = parameters, native, parameters.is_sharded
        self._refuse = refuse
        self._names = self._named()
        # By its id, every trainable parameter and its hook: the hash of a tensor is a call of Python.
        self._guards: dict[int, tuple[nn.Parameter, object]] = {}
        self._places: set[Place] = set()

    def watch_all(self, places: Iterable[Place]) -> None:
        """Watch what is trainable now; others may come to these places later."""
        self._places = set(places)
        for parameter in filter(lambda p: p.requires_grad and p.numel(), self._names):
            self.watch(parameter)

    def _named(self) -> dict[nn.Parameter, str]:
        """The names of those that layers use, and of those that optimizers step."""
        return {p: name for name, p in (*self._parameters.used(), *self._parameters.stepped())}

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
            if not self.is_sharded:
                check_not_sharded(self._parameters.model)
            self._names = self._named()
            if self.is_sharded and parameter not in self._names:
                raise ValueError(_NEWCOMER.format(tuple(parameter.shape)))
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
        return name or next((name for name, p in self._parameters.model.named_parameters() if p is parameter), UNKNOWN)

    def vector(self, vectors: ParameterVector) -> dict[nn.Parameter, Tensor]:
        """The part of a vector of the parameter space that belongs to each parameter; raises as `by_parameter`.

        The parameters are those that layers use; the parts are like those that optimizers step.
        """
        used = dict(self._parameters.used())
        parts = by_parameter(dict(self._parameters.stepped()), self._parameters.aliases(), vectors)
        return {used[name]: part for name, part in parts.items()}

    def stepped_of(self, used: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those that optimizers step in the place of some that layers use."""
        return self._parameters.stepped_of(used)

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
        for module in modules_in(self._parameters.model):
            if type(module) is DistributedDataParallel:
                check_not_wrapped(self._parameters.model)
            for key, parameter in module._parameters.items():
                if id(parameter) not in self._guards and parameter is not None and parameter.requires_grad:
                    self._admit(module, key, parameter)

    def _admit(self, module: nn.Module, key: str, newcomer: Tensor) -> None:
        if not isinstance(newcomer, nn.Parameter) or newcomer.numel() == 0:  # the others are of functional_call
            return
        if self._parameters.is_temporary(newcomer):
            return
        if (module, key) not in self._places:
            raise ValueError(
                f"parameter '{self.name_of(newcomer)}' came into the model after its capture, so backward would write"
                " its plain gradient: call .remove() on the handle and capture the model again"
            )
        self.watch(newcomer)

    def check_unhooked(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raise ValueError if one that layers use, or that optimizers step, has gradient hooks of somebody else."""
        if self.is_sharded:
            parameters = [*parameters]
            parameters += self._parameters.stepped_of(parameters)
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
