"""Training steps with FSDP2 (`fully_shard` of every block and of the model), as lists of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from .links import Network
from .schedule import HEADER, WORD, Plan, Task, buckets, numbers, reduced, size, total
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
    root, _ = groups(layers)
    head, computed = _backward(plan, layers, network, _forward(plan, layers, network), scatter=True)
    plan.send("backward", network.reduce_scatter(size(root)), [head, *computed])
    return plan.tasks


def exact(layers: Sequence[Layer], network: Network, samples: int) -> list[Task]:
    """After the backward, group by group: the mean gradient for the alignments; then the weighted sum, to shards.

    No more than the gradient of one group is in memory, so that one waits for the other. Alignments are with the
    difference from a rank's own mean, which is not kept but computed again.
    """
    plan = Plan()
    done = _forward(plan, layers, network)
    plan.send("header", network.all_gather(HEADER * network.ranks), [done])
    without_gradient = [replace(layer, backward=layer.backward - layer.gradient) for layer in layers]
    _, computed = _backward(plan, without_gradient, network, done, scatter=False)
    ready = [plan.send("parameters used", network.all_gather(WORD * network.ranks), computed)]
    root, blocks = groups(layers)
    for part in (root, *blocks):
        means = reduced(plan, "mean", "gradient", part, network.all_reduce, ready)
        ready = [
            plan.compute("own mean, alignments", 2 * total(bucket, "gradient"), [mean])
            for bucket, mean in zip(buckets(part), means, strict=True)
        ]
    ready = numbers(plan, network, samples, 0, ready)
    for part in (root, *blocks):
        ready = reduced(plan, "weighted sum", "gradient", part, network.reduce_scatter, ready)
    for name in ("norm", "end"):
        plan.send(name, network.all_gather(WORD * network.ranks), ready)
    return plan.tasks


def _forward(plan: Plan, layers: Sequence[Layer], network: Network) -> int:
    """The root is gathered at once, and its head computed after the blocks; returns that task."""
    root, blocks = groups(layers)
    gathered = plan.send("forward", network.all_gather(size(root)))
    _pass(plan, network, "forward", blocks, "forward", [gathered], gather=True)
    return plan.compute("forward", total(root, "forward"), [gathered])


def _backward(
    plan: Plan, layers: Sequence[Layer], network: Network, after: int, scatter: bool
) -> tuple[int, list[int]]:
    """The head first; returns that task, and those of the blocks."""
    root, blocks = groups(layers)
    head = plan.compute("backward", total(root, "backward"))
    return head, _pass(plan, network, "backward", blocks[::-1], "backward", [after], gather=True, scatter=scatter)


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
