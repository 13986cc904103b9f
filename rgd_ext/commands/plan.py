"""The `plan` command: how the capture would treat a model that a function of the user returns."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Literal

from torch import nn

from ..capture import precondition
from ..diffusion.batch_gradients import call
from ..metric import INVERSES, SCALE_FREE_POLICIES, Inverse, Policy
from ..planning.table import Plan
from . import resolve
from .arguments import FACTORY

POLICIES = {policy.__name__.lower(): policy for policy in SCALE_FREE_POLICIES}


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plan",
        help="print how the capture would treat each layer of a model, and what a step would cost",
        epilog=FACTORY,
    )
    parser.add_argument("model", metavar="MODULE:FACTORY", help="returns the model, or a tuple (model, x) with a batch")
    parser.add_argument(
        "--data", metavar="MODULE:FACTORY", help="returns a batch (x, y), or a loader, whose first batch is taken"
    )
    parser.add_argument(
        "--policy", choices=list(POLICIES), default="spectral", help="chooses epsilon (default: %(default)s)"
    )
    parser.add_argument(
        "--inverse",
        choices=list(INVERSES),
        default="weak-field",
        help="of the metric I + epsilon D (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-norm",
        choices=["error", "contribution"],
        default="error",
        help="what to do with batch normalisation in training mode (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-budget",
        type=float,
        metavar="BYTES",
        help="the memory for per-sample gradients, inf for no limit (default: three times the inputs and output"
        " gradients of each layer)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    policy = POLICIES[options.policy]()
    print(plan(options.model, options.data, policy, options.inverse, options.batch_norm, options.memory_budget))


def plan(
    model: str,
    data: str | None,
    epsilon: Policy,
    inverse: Inverse,
    batch_norm: Literal["error", "contribution"],
    memory_budget: float | None,
) -> Plan:
    """The plan for a batch.

    Args:
        model: "module:factory" of a model, or of a tuple (model, x) or (model, x, y).
        data: "module:factory" of a batch (x, y), or of a loader; None if `model` gives the batch.
        epsilon, inverse, batch_norm, memory_budget: of `rgd_ext.precondition`.

    Raises:
        ValueError, TypeError: for factories that return something else, and as `rgd_ext.precondition`.
    """
    made = resolve.make(model, (nn.Module, tuple), "a torch.nn.Module, or a tuple (model, x)")
    network, *rest = made if isinstance(made, tuple) else (made,)
    if not isinstance(network, nn.Module):
        raise TypeError(f"{model} returned a tuple that starts with a {type(network).__name__}: return (model, x)")
    if data is not None:
        rest = [*_batch(data)]
    if not rest:
        raise ValueError(f"{model} returned a model without a batch: return (model, x), or name one with --data")
    with precondition(
        network, epsilon=epsilon, inverse=inverse, batch_norm=batch_norm, memory_budget=memory_budget
    ) as handle:
        return call(handle.plan, rest[0])


def _batch(data: str) -> tuple | list:
    """The batch that a factory returns, or the first one of its loader: (x, y), or x alone in a tuple."""
    made = resolve.make(data, Iterable, "a batch (x, y), or a loader")
    if isinstance(made, tuple):
        return made
    batch = next(iter(made), None)
    if batch is None:
        raise ValueError(f"{data} returned a loader without batches: return one that gives pairs (x, y)")
    return batch if isinstance(batch, (tuple, list)) else (batch,)
