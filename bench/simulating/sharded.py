"""Training steps with FSDP2 (`fully_shard` of every block and of the model), as lists of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from .links import Network
from .schedule import HEADER, Plan, Task, numbers, size, total
from .workload import Layer

Group = list[Layer]


def groups(layers: Sequence[Layer]) -> tuple[Group, list[Group]]:
    """The layers of the root, and those of each block."""
    ordered = sorted(layers, key=lambda layer: layer.group)
    root, *blocks = (list(members) for _, members in groupby(ordered, key=lambda layer: layer.group))
    return root, blocks


def sgd(layers: Sequence[Layer], network: Network, samples: int) -> list[Task]:
    """FSDP2: parameters are gathered in the forward and again in the backward, and gradients reduced to shards."""
    plan = Plan()
    _backward(plan, layers, network, _forward(plan, layers, network))
    return plan.tasks


def exact(layers: Sequence[Layer], network: Network, samples: int) -> list[Task]:
    """The mean gradient is gathered group by group for the alignments, and the weighted sum reduced to shards."""
    plan = Plan()
    done = _forward(plan, layers, network)
    plan.send("header", network.all_gather(HEADER * network.ranks), [done])
    _backward(plan, layers, network, done)
    root, blocks = groups(layers)
    backwards = [*reversed(blocks), root]
    aligned = _pass(plan, network, "alignments", backwards, "gradient", gather=True)
    ready = numbers(plan, network, samples, 0, aligned)
    _pass(plan, network, "weighted sum", backwards, "gradient", ready, scatter=True)
    return plan.tasks


def _forward(plan: Plan, layers: Sequence[Layer], network: Network) -> int:
    """The root is gathered at once, and its head computed after the blocks; returns that task."""
    root, blocks = groups(layers)
    gathered = plan.send("forward", network.all_gather(size(root)))
    _pass(plan, network, "forward", blocks, "forward", [gathered], gather=True)
    return plan.compute("forward", total(root, "forward"), [gathered])


def _backward(plan: Plan, layers: Sequence[Layer], network: Network, after: int) -> None:
    """The head first. The gradient of the root is complete after all blocks, since it has the embedding."""
    root, blocks = groups(layers)
    head = plan.compute("backward", total(root, "backward"))
    computed = _pass(plan, network, "backward", blocks[::-1], "backward", [after], gather=True, scatter=True)
    plan.send("backward", network.reduce_scatter(size(root)), [head, *computed])


def _pass(
    plan: Plan,
    network: Network,
    name: str,
    parts: Sequence[Group],
    seconds: str,
    after: Iterable[int] = (),
    gather: bool = False,
    scatter: bool = False,
) -> list[int]:
    """Compute group by group, with an all-gather before each or a reduce-scatter after it; returns what is computed.

    The all-gather of a group runs during the computation of the one before. The memory holds no more than these two.
    """
    gathered: list[int] = []
    computed: list[int] = []
    for index, part in enumerate(parts):
        if gather:
            ahead, before = parts[len(gathered) : index + 2], [*after, *computed[-1:]]
            gathered += [plan.send(name, network.all_gather(size(one)), before) for one in ahead]
        computed.append(plan.compute(name, total(part, seconds), [*after, *gathered[index : index + 1]]))
        if scatter:
            plan.send(name, network.reduce_scatter(size(part)), computed[-1:])
    return computed
