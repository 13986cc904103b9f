"""What forwards may change in a model and in random number generators, noted and put back."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from .batch import holds_fields, modules_in, storage
from .watching import Watching

# What takes more bytes is a table that forwards read, such as quantised weights.
_LARGEST_COPY = 64 << 20
_IMMUTABLE = bool, int, float, str
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
    except Exception as error:  # whatever the object's own __deepcopy__ raises
        kind = type(leaf).__name__
        raise TypeError(f"an argument ({kind}) cannot be copied, so that other calls would change it") from error


class RandomNumbers:
    """The states of the random number generators that a forward may draw from.

    Args:
        devices: CUDA devices.
        own: generators of the model and its arguments, of torch, Python or NumPy.
    """

    def __init__(self, devices: Iterable[torch.device], own: Iterable[object]) -> None:
        own = list({id(generator): generator for generator in own}.values())
        self._devices, self._own = list(devices), [each for each in own if isinstance(each, torch.Generator)]
        self._states = self._of_torch()
        numpy = sys.modules.get("numpy")
        self._others = [random, *([] if numpy is None else [numpy.random])]
        self._others += [each for each in own if not isinstance(each, torch.Generator)]
        self._other_states = [_state_of(each) for each in self._others]

    def _of_torch(self) -> list[Tensor]:
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
        return states + [generator.get_state() for generator in self._own]

    def have_drawn(self) -> bool:
        """Whether a generator of torch's has been used since."""
        return any(not torch.equal(a, b) for a, b in zip(self._states, self._of_torch(), strict=True))

    def have_others_drawn(self) -> bool:
        """Whether a generator of Python's or NumPy's has been used since; what they give may depend on the batch."""
        return any(_state_of(each) != state for each, state in zip(self._others, self._other_states, strict=True))

    def rewind(self) -> None:
        """Draw the same numbers again."""
        cpu, *others = self._states
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, others, strict=False):
            torch.cuda.set_rng_state(state, device)
        for generator, state in zip(self._own, others[len(self._devices) :], strict=True):
            generator.set_state(state)
        for each, state in zip(self._others, self._other_states, strict=True):
            _set_state(each, state)


def is_generator(x: object) -> bool:
    """Whether `x` is a random number generator of torch, Python or NumPy."""
    numpy = sys.modules.get("numpy")
    of_numpy = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return isinstance(x, (torch.Generator, random.Random, *of_numpy))


def _state_of(generator: object) -> tuple | bytes:
    """Of Python's or NumPy's generators, or their modules, for `==`."""
    if hasattr(generator, "getstate"):
        return generator.getstate()
    return pickle.dumps(generator.get_state() if hasattr(generator, "get_state") else generator.bit_generator.state)


def _set_state(generator: object, state: tuple | bytes) -> None:
    if hasattr(generator, "setstate"):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(pickle.loads(state))
    else:
        generator.bit_generator.state = pickle.loads(state)


class _Writes(Watching):
    """Notes parameters before operators change them in place.

    Attributes:
        before: their values.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.before: dict[nn.Parameter, Tensor] = {}
        self._owners = {storage(p): p for p in parameters if p.layout == torch.strided}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled parts run compiled."""
        return True

    def operator(self, func: Callable, args: tuple, kwargs: dict) -> object:
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(args[place] if place < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _note(self, written: object) -> None:
        for x in pytree.tree_leaves(written):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                owner = self._owners.get(storage(x))
                if owner is not None and owner not in self.before:
                    self.before[owner] = owner.detach().clone()


class ModelState:
    """The attributes of all modules of a model: buffers, modes, hooks, and whatever forwards keep there.

    Args:
        model: the whole model.
        called: the module in it whose forward is called; hooks around that are its caller's.
    """

    def __init__(self, model: nn.Module, called: nn.Module) -> None:
        modules = modules_in(model)
        leaves = [leaf for module in modules for leaf in _leaves(vars(module))]
        lists = [each for leaf in leaves if isinstance(leaf, nn.Module) for each in modules_in(leaf)]
        self._generators = [leaf for leaf in leaves if is_generator(leaf)]
        self._attributes = [(module, dict(vars(module))) for module in dict.fromkeys([*modules, *lists])]
        self._others = [module for module, _ in self._attributes if module is not called]
        places = [places for module, _ in self._attributes for places in (module._parameters, module._modules)]
        self._places = [(each, dict(each)) for each in places]
        parameters = list(dict.fromkeys(p for module, _ in self._attributes for p in module._parameters.values()))
        self._data = [(p, p.data) for p in parameters if p is not None and p.layout == torch.strided]
        self.writes = _Writes(p for p, _ in self._data)

    def generators(self) -> list[object]:
        """Those that modules keep as attributes."""
        return self._generators

    def has_hooks(self) -> bool:
        """Whether modules besides the one called have hooks around their forwards."""
        return any(vars(module).get(name) for module in self._others for name in _HOOKS)

    def moved(self) -> list[nn.Parameter]:
        """The parameters that forwards have changed, in place as far as they ran under `writes`."""
        return [p for p, data in self._data if p in self.writes.before or p.data_ptr() != data.data_ptr()]

    def restore(self) -> None:
        """Every attribute is again the object it was, and parameters have their values."""
        for module, attributes in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for places, contents in self._places:
            places.clear()
            places.update(contents)
        for parameter, data in self._data:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
        for parameter, value in self.writes.before.items():
            parameter.data.copy_(value)  # autograd, which may have saved the parameter, must not notice

    def is_changed(self) -> bool:
        """Whether a forward since `lend` has changed a buffer."""
        for module, attributes in self._attributes:
            now = module._buffers
            if any(name not in now or not _is_same(x, now[name]) for name, x in attributes["_buffers"].items()):
                return True
        return False

    def lend(self, hooks: bool, frozen_statistics: bool) -> None:
        """Restore, and put copies in the places of what forwards may change.

        Args:
            hooks: whether hooks around the forwards of other modules than the one called stay.
            frozen_statistics: whether batch normalisation takes its running statistics, where it has them.
        """
        self.restore()
        memo: dict[int, object] = {}
        for module, attributes in self._attributes:
            copies = {name: _copied(value, memo) for name, value in attributes.items() if name not in _STRUCTURE}
            vars(module).update(copies)
            if frozen_statistics and isinstance(module, _BatchNorm) and module.running_mean is not None:
                vars(module)["training"] = False
        if not hooks:
            for module in self._others:
                vars(module).update({name: OrderedDict() for name in _HOOKS})


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


def _leaves(value: object, inside: bool = False) -> Iterator[object]:
    """What `_copied` copies, or leaves as it is, in containers and objects."""
    if isinstance(value, (dict, UserDict)):
        value = value.values()
    elif _is_plain(value) and not inside:
        value, inside = vars(value).values(), True
    elif not isinstance(value, (list, tuple, set, deque)):
        yield value
        return
    for item in value:
        yield from _leaves(item, inside)


def _copied(value: object, memo: dict[int, object], inside: bool = False) -> object:
    """A copy of a tensor or an array, or of a container or object and what is in it; of objects in objects none."""
    if value is None or type(value) in _IMMUTABLE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    copied = value
    if isinstance(value, Tensor):
        is_plain = not isinstance(value, nn.Parameter) and value.layout == torch.strided
        copied = detached_copy(value) if is_plain and value.nbytes <= _LARGEST_COPY else value
    elif isinstance(value, dict):
        # Nearly all are empty: of hooks, buffers and the like.
        copied = memo[id(value)] = value.copy() if type(value) in (dict, OrderedDict) else copy.copy(value)
        for key, item in value.items():
            copied[key] = _copied(item, memo, inside)
    elif isinstance(value, UserDict):
        copied = memo[id(value)] = copy.copy(value)
        copied.data = _copied(value.data, memo, inside)
    elif isinstance(value, list):
        copied = memo[id(value)] = copy.copy(value)
        copied[:] = [_copied(item, memo, inside) for item in value]
    elif type(value) is tuple:
        copied = tuple([_copied(item, memo, inside) for item in value])
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        copied = type(value)(*[_copied(item, memo, inside) for item in value])
    elif isinstance(value, deque):
        copied = deque([_copied(item, memo, inside) for item in value], value.maxlen)
    elif isinstance(value, set) or type(value).__module__ == "numpy":
        copied = copy.copy(value)
    elif not inside and _is_plain(value):
        copied = _copied_object(value, memo)
    memo[id(value)] = copied
    return copied


def _is_plain(value: object) -> bool:
    """Whether an object is what its attributes are."""
    kind = type(value)
    if not hasattr(value, "__dict__") or callable(value) or isinstance(value, (type, Tensor, nn.Module)):
        return False
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return False
    return not any(hasattr(kind, name) for name in ("__copy__", "__setstate__", "__del__"))


def _copied_object(value: object, memo: dict[int, object]) -> object:
    try:
        copied = copy.copy(value)
    except Exception:  # of a constructor that wants arguments
        return value
    if copied is not value:
        memo[id(value)] = copied
        vars(copied).update({name: _copied(item, memo, True) for name, item in vars(value).items()})
    return copied
