"""Vectors of the parameter space, as users pass them: by name, or in the order of `model.parameters()`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor, nn

from .. import ops
from ..metric import ParameterVector


def by_parameter(
    parameters: Mapping[str, nn.Parameter], aliases: Mapping[str, str], vectors: ParameterVector
) -> dict[str, Tensor]:
    """The part of a vector that belongs to each parameter, by its name.

    Args:
        parameters: of the model, by name.
        aliases: for each name of a parameter the one in `parameters`, which differs where it is tied.
        vectors: a dict from names of trainable parameters, where missing ones count as zeros, and a tied one may have
            any of its names; or a sequence with a tensor for each trainable parameter, in the order of
            `model.parameters()`.

    Raises:
        ValueError: for wrong names, numbers, shapes or devices.
        TypeError: for wrong dtypes, or what is neither a dict nor a sequence of tensors.
    """
    if isinstance(vectors, Set):
        raise TypeError("vectors is a set, which has no order: pass a list, or a dict from names")
    names = aliases if isinstance(vectors, Mapping) else {name: name for name in parameters}
    trainable = {alias: parameters[name] for alias, name in names.items() if parameters[name].requires_grad}
    given = dict(vectors) if isinstance(vectors, Mapping) else _in_order(ops.as_list(vectors), trainable)
    for name, vector in given.items():
        if name not in trainable:
            raise ValueError(f"vectors has {name!r}, which is not a trainable parameter: those are {_some(trainable)}")
        if vector is None:
            raise TypeError(
                f"the vector of parameter '{name}' is None: pass zeros, or a dict from names that leaves it out"
            )
        ops.check_vector(f"the vector of parameter '{name}'", vector, trainable[name].shape, trainable[name])
    found = {aliases[name]: _dense(vector.detach()) for name, vector in given.items()}
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


def _dense(vector: Tensor) -> Tensor:
    return vector if vector.layout == torch.strided else vector.to_dense()


def _some(names: Iterable[object]) -> str:
    names = [*names]
    first = ", ".join(map(repr, names[:4]))
    return first if len(names) <= 4 else f"{first}, ..."
