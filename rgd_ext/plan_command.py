"""The `plan` command: how the capture would treat a model that a factory of the user's makes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from . import resolve
from .batch_gradients import called
from .capture import precondition
from .capture.plan import Plan
from .metric import Policy


def plan(
    model: str, data: str | None, epsilon: Policy, inverse: str, batch_norm: str, memory_budget: float | None
) -> Plan:
    """The plan for a batch.

    Args:
        model: "module:factory" of a model, or of a tuple (model, x) or (model, x, y).
        data: "module:factory" of a batch (x, y), or of a loader; None if `model` gives the batch.
        epsilon, inverse, batch_norm, memory_budget: of `rgd_ext.precondition`.

    Raises:
        ValueError, TypeError: for factories that give something else, and as `rgd_ext.precondition`.
    """
    made = resolve.make(model, (nn.Module, tuple), "a torch.nn.Module, or a tuple (model, x)")
    network, *rest = made if isinstance(made, tuple) else (made,)
    if not isinstance(network, nn.Module):
        raise TypeError(f"{model} returned a tuple that starts with a {type(network).__name__}: return (model, x)")
    if data is not None:
        rest = _batch(data)
    if not rest:
        raise ValueError(f"{model} returned a model without a batch: return (model, x), or name one with --data")
    with precondition(
        network, epsilon=epsilon, inverse=inverse, batch_norm=batch_norm, memory_budget=memory_budget
    ) as handle:
        return called(handle.plan, rest[0])


def _batch(data: str) -> tuple | list:
    """The batch a factory gives, (x, y) or x alone in a tuple or list."""
    made = resolve.make(data, Iterable, "a batch (x, y), or a loader")
    if isinstance(made, tuple):
        return made
    batch = next(iter(made), None)
    if batch is None:
        raise ValueError(f"{data} returned a loader without batches: return one that gives pairs (x, y)")
    return batch if isinstance(batch, (tuple, list)) else (batch,)
