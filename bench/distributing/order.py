"""The order of methods by time, as a simulation with measured layers and links predicts it, beside the measured one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import permutations

from ..simulating import schedule
from ..simulating.links import Link, Network
from ..simulating.prediction import predicted_order
from ..simulating.schedule import Method
from ..simulating.workload import Layer

# Medians that differ by less are no order, on a machine that others use.
MARGIN = 1.3


def predicted(
    layers: Sequence[Layer], link: Link, size: int, samples: int, gradients: Mapping[str, float], overlap: bool
) -> dict[str, float]:
    """Milliseconds of a step by arm, the fastest first.

    Args:
        layers, link: as measured.
        size: the number of processes.
        samples: of each of them.
        gradients: how many gradients each arm hands to collectives: one for each Lanczos step, beside two.
        overlap: whether processes compute while they send.
    """
    methods: dict[str, Method] = {
        "SGD": schedule.sgd,
        "RGD local": schedule.local,
        "RGD Rayleigh": schedule.exact,
        "RGD Spectral": partial(schedule.exact, lanczos=round(gradients["RGD Spectral"]) - 2),
    }
    seconds = predicted_order(layers, Network(size, link), samples, methods, overlap)
    return {name: 1e3 * each for name, each in seconds.items()}


def in_order(times: Mapping[str, float]) -> str:
    """The arms from the fastest to the slowest, with their times relative to the fastest."""
    least = min(times.values())
    return ", ".join(f"{name} ({time / least:.2f})" for name, time in sorted(times.items(), key=lambda pair: pair[1]))


def wrongly_predicted(measured: Mapping[str, float], predicted: Mapping[str, float]) -> list[str]:
    """The pairs of arms that clearly differ, and are predicted the other way round."""
    return [
        f"{fast} before {slow}"
        for fast, slow in permutations(predicted, 2)
        if measured[slow] > MARGIN * measured[fast] and predicted[slow] <= predicted[fast]
    ]
