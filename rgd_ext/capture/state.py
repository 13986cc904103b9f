"""What forwards may change in a model and in random number generators, noted and put back."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from .batch import holds_fields, modules_in

# What takes more bytes is a table that forwards read, such as quantised weights.
_LARGEST_COPY = 64 << 20
_STRUCTURE = ("_parameters", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def detached_copy(x: Tensor) -> Tensor:
    """A leaf with the value of `x`."""
    return x.detach().clone().requires_grad_(x.requires_grad)


def with_tensors(function: Callable[[Tensor], Tensor], tree: object) -> object:
    """A copy of `tree` with `function` of its tensors, those that `tensors_in` finds, in the same order."""

    def of_leaf(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, Mapping):
            # A copy of another mapping may share what it holds.
            copied = copy.copy(leaf) if isinstance(leaf, (dict, UserDict)) else dict(leaf)
            for key, value in leaf.items():
                copied[key] = with_tensors(function, value)
            return copied
        if holds_fields(leaf):
            copied = copy.copy(leaf)
            for key, value in vars(leaf).items():
                object.__setattr__(copied, key, with_tensors(function, value))
            return copied
        return _own(leaf)

    return pytree.tree_map(of_leaf, tree)


def _own(leaf: object) -> object:
    """A copy of an argument that a forward may change, such as a cache; what has no state is passed on as it is."""
    if isinstance(leaf, Iterator):
        raise TypeError("an argument is an iterator, which can be read once")
    if isinstance(leaf, (nn.Module, type)) or callable(leaf) or not hasattr(leaf, "__dict__"):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # whatever the object's own __deepcopy__ raises
        return leaf


class RandomNumbers:
    """The states of the random number generators that a forward may draw from.

    Args:
        devices: CUDA devices.
        own: generators of the model.
    """

    def __init__(self, devices: Iterable[torch.device], own: Iterable[torch.Generator]) -> None:
        self._devices, self._own = list(devices), list(own)
        self._states = self._of_torch()
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def _of_torch(self) -> list[Tensor]:
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
        return states + [generator.get_state() for generator in self._own]

    def have_drawn(self) -> bool:
        """Whether a generator of torch's has been used since."""
        return any(not torch.equal(a, b) for a, b in zip(self._states, self._of_torch(), strict=True))

    def have_others_drawn(self) -> bool:
        """Whether Python's generator or NumPy's has been used since; what they give may depend on the batch."""
        if random.getstate() != self._python:
            return True
        if self._numpy is None:
            return False
        _, before, position, *_ = self._numpy
        _, now, moved, *_ = sys.modules["numpy"].random.get_state()
        return moved != position or (now != before).any()

    def rewind(self) -> None:
        """Draw the same numbers again."""
        cpu, *others = self._states
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, others, strict=False):
            torch.cuda.set_rng_state(state, device)
        for generator, state in zip(self._own, others[len(self._devices) :], strict=True):
            generator.set_state(state)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


class ModelState:
    """The attributes of all modules of a model: buffers, modes, hooks, and whatever forwards keep there."""

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(module, dict(vars(module))) for module in modules_in(model)]
        places = [places for module, _ in self._attributes for places in (module._parameters, module._modules)]
        self._places = [(each, dict(each)) for each in places]
        self._parameters = [(p, p._version, p.detach().clone()) for p in _moving(model)]

    def generators(self) -> list[torch.Generator]:
        """Those that modules keep as attributes."""
        values = (value for _, attributes in self._attributes for value in attributes.values())
        return [value for value in values if isinstance(value, torch.Generator)]

    def has_hooks(self) -> bool:
        """Whether a module inside the model has hooks around its forward."""
        return any(attributes.get(name) for _, attributes in self._attributes[1:] for name in _HOOKS)

    def restore(self) -> None:
        """Every attribute is again the object it was."""
        for module, attributes in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for places, contents in self._places:
            places.clear()
            places.update(contents)
        for parameter, version, value in self._parameters:
            if parameter._version != version:
                parameter.detach().copy_(value)

    def lend(self, hooks: bool, frozen_statistics: bool) -> None:
        """Restore, and put copies in the places of what forwards may change.

        Args:
            hooks: whether hooks around the forwards of modules inside the model stay.
            frozen_statistics: whether batch normalisation takes its running statistics, where it has them.
        """
        self.restore()
        for module, attributes in self._attributes:
            copies = {name: _copied(value) for name, value in attributes.items() if name not in _STRUCTURE}
            vars(module).update(copies)
            if frozen_statistics and isinstance(module, _BatchNorm) and module.running_mean is not None:
                vars(module)["training"] = False
        if not hooks:
            for module, _ in self._attributes[1:]:
                vars(module).update({name: OrderedDict() for name in _HOOKS})


def _moving(model: nn.Module) -> list[nn.Parameter]:
    """Frozen parameters that a forward may move, as the average of the others: if there are no more than of those."""
    trained, frozen = [], []
    for parameter in model.parameters():
        (trained if parameter.requires_grad else frozen).append(parameter)
    is_average = sum(p.nbytes for p in frozen) <= sum(p.nbytes for p in trained)
    return [p for p in frozen if p.layout == torch.strided] if is_average else []


def _copied(value: object) -> object:
    """A copy of a tensor or an array, or of a container and what is in it."""
    if isinstance(value, Tensor):
        is_plain = not isinstance(value, nn.Parameter) and value.layout == torch.strided
        return detached_copy(value) if is_plain and value.nbytes <= _LARGEST_COPY else value
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _copied(item) for key, item in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if isinstance(value, deque):
        return deque(map(_copied, value), value.maxlen)
    if isinstance(value, set) or type(value).__module__ == "numpy":
        return copy.copy(value)
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{key: _copied(item) for key, item in vars(value).items()})
    return value
