"""The tensors in nested arguments, and the modules in modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from types import SimpleNamespace

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def holds_fields(leaf: object) -> bool:
    """Whether `leaf` is a dataclass or a namespace."""
    return (is_dataclass(leaf) and not isinstance(leaf, type)) or isinstance(leaf, SimpleNamespace)


def tensors_in(tree: object) -> list[Tensor]:
    """The tensors among the leaves of nested tuples, lists, mappings, dataclasses and namespaces."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_in(list(leaf.values()))
        elif holds_fields(leaf):
            found += tensors_in(list(vars(leaf).values()))
    return found


def arrays_in(args: tuple, kwargs: dict) -> Sequence[Tensor]:
    """The tensors with dimensions among the arguments of a call."""
    # There is nearly always one tensor, which needs no search.
    found = args if len(args) == 1 and type(args[0]) is Tensor and not kwargs else tensors_in((args, kwargs))
    return [t for t in found if t.ndim > 0]


def modules_in(model: nn.Module) -> list[nn.Module]:
    """The modules of `model.modules()`, found in a fraction of the time."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found
