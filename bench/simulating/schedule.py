"""What a training step computes and sends, as a list of tasks in the order in which a rank issues them.

A method is a function of layers, a network and the number of samples of a rank. SGD runs as in DDP and FSDP2 of
PyTorch. RGD all-reduces the mean gradient during the backward; then come the alignments with it, numbers of every
sample, and the weighted sum of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .links import Cost, Network
from .workload import BYTES, Layer

CAPACITY = 25 * 2**20  # bytes of a bucket, as in DDP
HEADER = 6 * 8  # bytes of a rank: the integers at the start of an exchange
WORD = 8  # bytes of a rank: a mask of parameters, a norm, or that the step has ended
NUMBERS = 2 * 8  # bytes of a sample


@dataclass(frozen=True)
class Task:
    """Seconds on the compute stream or, with `sent` bytes, on the network, after tasks of the list by their index."""

    name: str
    seconds: float
    after: tuple[int, ...] = ()
    network: bool = False
    sent: float = 0
    messages: int = 0


class Plan:
    """The tasks so far. `compute` and `send` append one and return its index."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def compute(self, name: str, seconds: float, after: Iterable[int] = ()) -> int:
        return self._append(Task(name, seconds, tuple(after)))

    def send(self, name: str, cost: Cost, after: Iterable[int] = ()) -> int:
        return self._append(Task(name, cost.seconds, tuple(after), True, cost.sent, cost.messages))

    def _append(self, task: Task) -> int:
        self.tasks.append(task)
        return len(self.tasks) - 1


Method = Callable[[Sequence[Layer], Network, int], list[Task]]


def total(layers: Iterable[Layer], part: str) -> float:
    """The sum of an attribute over layers."""
    return sum(getattr(layer, part) for layer in layers)


def size(layers: Iterable[Layer]) -> float:
    """Bytes of the parameters, or of their gradient."""
    return BYTES * total(layers, "parameters")


def buckets(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers from the last to the first. A bucket is closed as soon as it has 25 MB or more."""
    closed: list[list[Layer]] = []
    bucket: list[Layer] = []
    for layer in reversed(layers):
        bucket.append(layer)
        if size(bucket) >= CAPACITY:
            closed.append(bucket)
            bucket = []
    return [*closed, bucket] if bucket else closed


def reduced(
    plan: Plan,
    name: str,
    part: str,
    layers: Sequence[Layer],
    collective: Callable[[float], Cost],
    after: Iterable[int] = (),
) -> list[int]:
    """Compute each bucket and send it, by an all-reduce or a reduce-scatter, while the next one is computed."""
    sent = []
    for bucket in buckets(layers):
        computed = plan.compute(name, total(bucket, part), after)
        sent.append(plan.send(name, collective(size(bucket)), [computed]))
    return sent


def numbers(plan: Plan, network: Network, samples: int, scalars: int, after: Iterable[int]) -> list[int]:
    """All-gather the numbers of samples, and `scalars` of each rank."""
    each = NUMBERS * samples + WORD * scalars
    return [plan.send("numbers", network.all_gather(each * network.ranks), after)]


def sgd(layers: Sequence[Layer], network: Network, samples: int) -> list[Task]:
    """DDP."""
    plan = Plan()
    plan.compute("forward", total(layers, "forward"))
    reduced(plan, "backward", "backward", layers, network.all_reduce)
    return plan.tasks


def local(layers: Sequence[Layer], network: Network, samples: int) -> list[Task]:
    """`mode="local"`: weights from the samples of the rank alone, so that only the weighted sum is sent."""
    plan = Plan()
    done = plan.compute("forward", total(layers, "forward"))
    plan.send("header", network.all_gather(HEADER * network.ranks), [done])
    done = plan.compute("backward", total(layers, "backward"))
    plan.send("parameters used", network.all_gather(WORD * network.ranks), [done])
    done = plan.compute("weighted sum", total(layers, "gradient"))
    for bucket in buckets(layers):
        plan.send("weighted sum", network.all_reduce(size(bucket)), [done])
    plan.send("end", network.all_gather(WORD * network.ranks))
    return plan.tasks


def exact(layers: Sequence[Layer], network: Network, samples: int, scalars: int = 0, lanczos: int = 0) -> list[Task]:
    """Weights from all samples of all ranks, after `lanczos` products with D for lambda_max."""
    plan = Plan()
    done = plan.compute("forward", total(layers, "forward"))
    plan.send("header", network.all_gather(HEADER * network.ranks), [done])
    means = reduced(plan, "backward", "backward", layers, network.all_reduce)
    plan.send("parameters used", network.all_gather(WORD * network.ranks))
    ready: list[int] = []
    for _ in range(lanczos):  # D v is a weighted sum of gradients, whose weights are alignments with v
        aligned = plan.compute("Lanczos, alignments", total(layers, "gradient"), ready or means)
        ready = reduced(plan, "Lanczos, sum", "gradient", layers, network.all_reduce, [aligned])
    products = [  # with each bucket of the mean as soon as it is there
        plan.compute("alignments", total(bucket, "gradient"), [mean, *ready])
        for bucket, mean in zip(buckets(layers), means, strict=True)
    ]
    ready = numbers(plan, network, samples, scalars, products)
    reduced(plan, "weighted sum", "gradient", layers, network.all_reduce, ready)
    plan.send("end", network.all_gather(WORD * network.ranks))
    return plan.tasks
