"""The plan of a model: the strategy of each layer, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .planner import Choice

_HEADER = ("layer", "way", "ms", "MiB", "why")


@dataclass(frozen=True)
class Layer:
    """How the per-sample gradients of one layer are treated.

    Attributes:
        name: the layer's name.
        way: the strategy. With "ghost" the gradients are never formed, and the Gramian is computed from inputs and
            output gradients. With "materialise" they are formed for every sample and kept. With "recompute" they are
            formed a block at a time for the statistics, and not kept.
        why: the reason for the strategy of the parameter that takes the most time.
        seconds: the estimated time of statistics and combination.
        plain_seconds: the estimated time of the ordinary gradient in their place.
        bytes: the memory that is held until the backward ends.
    """

    name: str
    way: str
    why: str
    seconds: float
    plain_seconds: float
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The strategies that were chosen for the layers of a model. Printed, it is a table.

    Attributes:
        layers: in the order in which the model lists its parameters.
        rgd_seconds: the measured time of a forward and backward of the batch that writes the direction, or None.
        sgd_seconds: the measured time of an ordinary forward and backward, or None.
    """

    layers: tuple[Layer, ...]
    rgd_seconds: float | None = None
    sgd_seconds: float | None = None

    @property
    def bytes(self) -> int:
        """The memory that is held for the layers until the backward ends."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def seconds(self) -> float:
        """The estimated time beyond that of the ordinary gradients.

        It does not count what is the same for every strategy: the layers' rules, and Python.
        """
        return sum(layer.seconds - layer.plain_seconds for layer in self.layers)

    def __str__(self) -> str:
        rows = [
            (layer.name, layer.way, f"{1e3 * layer.seconds:.3f}", f"{layer.bytes / 2**20:.2f}", layer.why)
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
        lines = ["  ".join(map(_aligned, row, widths, _HEADER)).rstrip() for row in (_HEADER, *rows)]
        lines.append(f"total: {self.bytes / 2**20:.2f} MiB, {1e3 * self.seconds:.3f} ms more than ordinary gradients")
        if self.rgd_seconds is not None and self.sgd_seconds is not None:
            times = f"{1e3 * self.rgd_seconds:.2f} ms, SGD's {1e3 * self.sgd_seconds:.2f} ms"
            lines.append(
                f"measured: forward and backward {times}, a ratio of {self.rgd_seconds / self.sgd_seconds:.2f}"
            )
        return "\n".join(lines)


def _aligned(text: str, width: int, column: str) -> str:
    return text.rjust(width) if column in ("ms", "MiB") else text.ljust(width)


def plan_of(choices: Iterable[Choice], rgd_seconds: float | None = None, sgd_seconds: float | None = None) -> Plan:
    """The plan that consists of `choices`, with those for the parameters of one layer in one row."""
    layers: dict[str, list[Choice]] = {}
    for choice in choices:
        layers.setdefault(choice.name.rpartition(".")[0], []).append(choice)
    return Plan(tuple(_layer(name, parameters) for name, parameters in layers.items()), rgd_seconds, sgd_seconds)


def _layer(name: str, choices: list[Choice]) -> Layer:
    slowest = max(choices, key=lambda choice: choice.seconds(choice.cost))
    seconds = sum(choice.seconds(choice.cost) for choice in choices)
    plain = sum(choice.seconds(choice.plain) for choice in choices)
    held = sum(choice.cost.held for choice in choices)
    return Layer(name or "(model)", slowest.strategy, slowest.why, seconds, plain, held)
