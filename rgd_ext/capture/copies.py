"""Copies of the arguments and attributes that a forward may change."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..nests import holds_fields

# The largest number of bytes of a tensor that is copied. Larger ones are tables that forwards only read, such as
# quantised weights.
_LARGEST_COPY = 64 << 20
_IMMUTABLE = bool, int, float, str


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
            copied: Any = copy.copy(leaf) if isinstance(leaf, (dict, UserDict)) else dict(leaf)
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
    """A copy of an argument that a forward may change, such as a cache; one without state is passed on as it is."""
    if isinstance(leaf, Iterator):
        raise TypeError("an argument is an iterator, which can be read once")
    if isinstance(leaf, (nn.Module, type)) or callable(leaf) or not hasattr(leaf, "__dict__"):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception as error:  # whatever the object's own __deepcopy__ raises
        kind = type(leaf).__name__
        raise TypeError(f"an argument ({kind}) cannot be copied, so that other calls would change it") from error


def leaves_in(attributes: dict[str, object]) -> list[object]:
    """The objects that `own_copy` of a module's attributes meets in containers and objects, copied or not."""
    found, seen = [], {id(attributes)}
    waiting: list[tuple[object, bool]] = [(item, False) for item in attributes.values()]
    while waiting:
        value, inside = waiting.pop()
        if value is None or type(value) in _IMMUTABLE or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (dict, UserDict)):
            waiting += [(item, inside) for item in value.values()]
        elif isinstance(value, (list, tuple, set, deque)):
            waiting += [(item, inside) for item in value]
        elif not inside and _is_plain(value):
            waiting += [(item, True) for item in _fields(value).values()]
        else:
            found.append(value)
    return found


def own_copy(value: Any, memo: dict[int, object], inside: bool = False) -> Any:
    """A copy of a tensor or an array, or of a container or object and its content; objects in objects stay."""
    if value is None or type(value) in _IMMUTABLE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    copied: Any = value
    if isinstance(value, Tensor):
        is_plain = not isinstance(value, nn.Parameter) and value.layout == torch.strided
        copied = detached_copy(value) if is_plain and value.nbytes <= _LARGEST_COPY else value
    elif isinstance(value, dict):
        # Nearly all dictionaries of a module, such as those of its hooks and buffers, are empty.
        copied = memo[id(value)] = value.copy() if type(value) in (dict, OrderedDict) else copy.copy(value)
        for key, item in value.items():
            copied[key] = own_copy(item, memo, inside)
    elif isinstance(value, UserDict):
        copied = memo[id(value)] = copy.copy(value)
        copied.data = own_copy(value.data, memo, inside)
    elif isinstance(value, list):
        copied = memo[id(value)] = copy.copy(value)
        copied[:] = [own_copy(item, memo, inside) for item in value]
    elif type(value) is tuple:
        copied = tuple([own_copy(item, memo, inside) for item in value])
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        copied = type(value)(*[own_copy(item, memo, inside) for item in value])
    elif isinstance(value, deque):
        copied = deque([own_copy(item, memo, inside) for item in value], value.maxlen)
    elif isinstance(value, set) or type(value).__module__ == "numpy":
        copied = copy.copy(value)
    elif not inside and _is_plain(value):
        copied = _copied_object(value, memo)
    memo[id(value)] = copied
    return copied


def _is_plain(value: object) -> bool:
    """Whether an object consists of its attributes and nothing else."""
    kind = type(value)
    if kind is SimpleNamespace:
        return True
    if callable(value) or isinstance(value, (type, Tensor, nn.Module)) or not _fields(value):
        return False
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return False
    return not any(hasattr(kind, name) for name in ("__copy__", "__setstate__", "__del__"))


def _fields(value: object) -> dict[str, object]:
    """The attributes of an object, in its dictionary and its slots."""
    names = [*getattr(value, "__dict__", ())]
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _copied_object(value: object, memo: dict[int, object]) -> object:
    try:
        copied = copy.copy(value)
    except Exception:  # the constructor may require arguments
        return value
    if copied is not value:
        memo[id(value)] = copied
        for name, item in _fields(value).items():
            object.__setattr__(copied, name, own_copy(item, memo, True))
    return copied
