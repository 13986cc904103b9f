"""Vectors of the parameter space, as users pass them: by name, or in the order of `model.parameters()`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from torch import Tensor, nn

from .. import ops
from ..metric import ParameterVector


def by_parameter(model: nn.Module, vectors: ParameterVector) -> dict[nn.Parameter, Tensor]:
    """The part of a vector that belongs to each parameter.

    Args:
        model: the model.
        vectors: a dict from names of trainable parameters, where missing ones count as zeros, and a tied one may have
            any of its names; or a sequence with a tensor for each trainable parameter, in the order of
            `model.parameters()`.

    Raises:
        ValueError: for wrong names, numbers, shapes or devices.
        TypeError: for wrong dtypes, or what is neither a dict nor a sequence of tensors.
    """
    if isinstance(vectors, Set):
        raise TypeError("vectors is a set, which has no order: pass a list, or a dict from names")
    by_name = isinstance(vectors, Mapping)
    named = model.named_parameters(remove_duplicate=not by_name)
    trainable = {name: parameter for name, parameter in named if parameter.requires_grad}
    given = dict(vectors) if isinstance(vectors, Mapping) else _in_order(ops.as_list(vectors), trainable)
    for name, vector in given.items():
        if name not in trainable:
            raise ValueError(f"vectors has {name!r}, which is not a trainable parameter: those are {_some(trainable)}")
        if vector is None:
            raise TypeError(
                f"the vector of parameter '{name}' is None: pass zeros, or a dict from names that leaves it out"
            )
        ops.check_vector(f"the vector of parameter '{name}'", vector, trainable[name].shape, trainable[name])
    found = {trainable[name]: vector.detach().to_dense() for name, vector in given.items()}
    if len(found) < len(given):
        raise ValueError(f"vectors has several names of one tied parameter, {_some(given)}: pass one of them")
    return found


def _in_order(tensors: list[Tensor], names: Mapping[str, object]) -> dict[str, Tensor]:
    if len(tensors) != len(names):
        raise ValueError(
            f"vectors has {len(tensors)} tensors: pass one for each of the {len(names)} trainable parameters,"
            " [p.grad for p in model.parameters() if p.requires_grad], or a dict from their names"
        )
    return dict(zip(names, tensors, strict=True))


def _some(names: Iterable[object]) -> str:
    names = [*names]
    first = ", ".join(map(repr, names[:4]))
    return first if len(names) <= 4 else f"{first}, ..."
