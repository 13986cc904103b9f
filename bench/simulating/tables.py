"""The tables of docs/scaling.md: predicted traffic and steps, with SGD beside RGD."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .links import Link, Network
from .prediction import LANCZOS, REPLICATED, SHARDED
from .schedule import Method
from .simulation import Timeline, simulate
from .workload import MODELS, Device, Layer, materialised

# An H200 with TF32: its nominal rate without sparsity, and four fifths of its memory's.
DEVICE = Device(peak=495e12, utilisation=0.4, memory=0.8 * 4.8e12)
LATENCY = 5e-6  # seconds, see docs/scaling.md
RANKS = (8, 64, 512, 4096)
MIDDLE = 64  # ranks
GIGABITS = (400, 100, 25)
ALGORITHMS: tuple[Literal["ring", "tree"], ...] = ("ring", "tree")
REPLICABLE = [name for name in MODELS if name != "Llama 7B"]  # in 141 GB, with its gradients and momentum
KINDS: dict[str, Mapping[str, Method]] = {"DDP": REPLICATED, "FSDP2": SHARDED}
EVERY = 10
JITTERS = (0.0, 0.1, 0.3)
COMPARED = {"SGD ms": "{:,.0f}", "of it waiting": "{:,.0f}", "RGD / SGD": "{:.2f}", "RGD waiting ms": "{:,.0f}"}


@dataclass(frozen=True)
class Table:
    """Columns by name with the format of their values, and rows of values."""

    title: str
    columns: dict[str, str]
    rows: list[list[str | float]]

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        formats = self.columns.values()
        return [[form.format(value) for form, value in zip(formats, row, strict=True)] for row in self.rows]


def network(ranks: int, gigabits: float, algorithm: Literal["ring", "tree"] = "ring") -> Network:
    """With the bandwidth in Gbit/s."""
    return Network(ranks, Link(LATENCY, gigabits * 1e9 / 8), algorithm)


def run(method: Method, model: str, net: Network, layers: Sequence[Layer] | None = None) -> Timeline:
    """A step of a model, or of layers in place of its own."""
    return simulate(method(layers or MODELS[model].layers(DEVICE), net, MODELS[model].samples))


def traffic(model: str, few: int, many: int) -> Table:
    """Bytes and messages of a step."""
    columns = {"method": "{}", f"GB sent, {few} ranks": "{:.2f}", "collectives": "{:,}"}
    nets = [network(ranks, 100, algorithm) for ranks in (few, many) for algorithm in ALGORITHMS]
    columns |= {f"messages, {net.algorithm}, {net.ranks:,} ranks": "{:,}" for net in nets}
    rows: list[list[str | float]] = []
    for kind, methods in KINDS.items():
        for name, method in methods.items():
            first, *others = ([task for task in run(method, model, net).tasks if task.network] for net in nets)
            messages = [sum(task.messages for task in tasks) for tasks in (first, *others)]
            sent = sum(task.sent for task in first) / 1e9
            rows.append([f"{name}, {kind}" if name == "SGD" or kind == "FSDP2" else name, sent, len(first), *messages])
    return Table(f"traffic of a step of {model}", columns, rows)


def replicated(models: Sequence[str], ranks: int) -> Table:
    """Steps of methods with the whole model on each rank, by bandwidth."""
    kept, lanczos = "RGD, materialised", f"RGD, Lanczos {LANCZOS}, every={EVERY}"
    columns = {"model": "{}", "Gbit/s": "{}", "SGD ms": "{:,.0f}", "of it waiting": "{:,.0f}"}
    columns |= {f"{name} / SGD": "{:.2f}" for name in ("RGD local", "RGD")} | {"RGD waiting ms": "{:,.0f}"}
    columns |= {f"{name} / SGD": "{:.2f}" for name in (kept, lanczos)}
    rows: list[list[str | float]] = []
    for model in models:
        memory = materialised(MODELS[model].layers(DEVICE), MODELS[model].samples, DEVICE)
        for gigabits in GIGABITS:
            net = network(ranks, gigabits)
            steps = {name: run(method, model, net) for name, method in REPLICATED.items()}
            sgd, rgd = steps["SGD"], steps["RGD"]
            amortised = (steps["RGD, Lanczos"].seconds + (EVERY - 1) * rgd.seconds) / EVERY
            local, from_memory = steps["RGD local"].seconds, run(REPLICATED["RGD"], model, net, memory).seconds
            ratios = [seconds / sgd.seconds for seconds in (local, rgd.seconds, from_memory, amortised)]
            times = [sgd.seconds * 1e3, sgd.waiting * 1e3]
            rows.append([model, gigabits, *times, *ratios[:2], rgd.waiting * 1e3, *ratios[2:]])
    return Table(f"steps with DDP's traffic or twice that, ring of {ranks} ranks", columns, rows)


def _compared(methods: Mapping[str, Method], model: str, net: Network) -> list[str | float]:
    sgd, rgd = (run(methods[name], model, net) for name in ("SGD", "RGD"))
    return [sgd.seconds * 1e3, sgd.waiting * 1e3, rgd.seconds / sgd.seconds, rgd.waiting * 1e3]


def sharded(models: Sequence[str], ranks: int) -> Table:
    """Steps with FSDP2, by bandwidth."""
    columns = {"model": "{}", "Gbit/s": "{}"} | COMPARED
    nets = {gigabits: network(ranks, gigabits) for gigabits in GIGABITS}
    rows = [[model, gigabits, *_compared(SHARDED, model, net)] for model in models for gigabits, net in nets.items()]
    return Table(f"steps with FSDP2, ring of {ranks} ranks", columns, rows)


def growth(kind: str, models: Iterable[str], ranks: Sequence[int], speed: float) -> Table:
    """Steps by the number of ranks and by algorithm, at `speed` Gbit/s."""
    columns = {"model": "{}", "ranks": "{:,}", "algorithm": "{}"} | COMPARED
    rows: list[list[str | float]] = [
        [model, count, algorithm, *_compared(KINDS[kind], model, network(count, speed, algorithm))]
        for model in models
        for count in ranks
        for algorithm in ALGORITHMS
    ]
    return Table(f"steps with {kind} by the number of ranks, {speed} Gbit/s", columns, rows)


def jitter(model: str, ranks: int, speed: float) -> Table:
    """Steps where each computation of each rank takes up to so much longer, at random."""
    columns = {"at most": "+{:.0%}", "SGD ms": "{:,.1f}", "RGD ms": "{:,.1f}", "RGD / SGD": "{:.2f}"}
    rows: list[list[str | float]] = []
    for most in JITTERS:
        draw = random.Random(0)
        seconds = []
        for name in ("SGD", "RGD"):
            tasks = run(REPLICATED[name], model, network(ranks, speed)).tasks
            factors = [[draw.uniform(1, 1 + most) for _ in tasks] for _ in range(ranks)]
            seconds.append(simulate(tasks, factors).seconds)
        rows.append([most, *(1e3 * one for one in seconds), seconds[1] / seconds[0]])
    return Table(f"jitter: steps of {model}, ring of {ranks} ranks, {speed} Gbit/s", columns, rows)


def tables(quick: bool) -> list[Table]:
    """All of them."""
    models, ranks = (REPLICABLE[:1], RANKS[:2]) if quick else (REPLICABLE, RANKS)
    small, large = models[0], models[-1]
    return [
        traffic(small, ranks[0], ranks[-1]),
        replicated(models, MIDDLE),
        growth("DDP", dict.fromkeys((small, large)), ranks, 400),
        sharded(models if quick else list(MODELS), MIDDLE),
        growth("FSDP2", [small if quick else "Llama 7B"], ranks, 400),
        jitter(small, MIDDLE, 400),
    ]
