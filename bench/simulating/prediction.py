"""Methods by name, and the seconds that their steps take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from . import schedule, sharded
from .links import Network
from .schedule import Method
from .simulation import simulate
from .workload import Layer

LANCZOS = 20  # steps
REPLICATED: dict[str, Method] = {
    "SGD": schedule.sgd,
    "RGD local": schedule.local,
    "RGD": schedule.exact,
    "RGD, bound": partial(schedule.exact, scalars=1),
    "RGD, Lanczos": partial(schedule.exact, lanczos=LANCZOS),
}
SHARDED: dict[str, Method] = {"SGD": sharded.sgd, "RGD": sharded.exact}


def predicted_order(
    layers: Sequence[Layer],
    network: Network,
    samples: int,
    methods: Mapping[str, Method] = REPLICATED,
    overlap: bool = True,
) -> dict[str, float]:
    """The seconds of a step by method, the fastest first.

    Args:
        layers: with measured times, in the order of the forward.
        network: with the measured latency and bandwidth of a link.
        samples: of a rank.
        methods: as in `REPLICATED` or `SHARDED`.
        overlap: whether ranks compute while they send; False where processes have no processors left for it.
    """
    steps = {name: simulate(method(layers, network, samples), overlap=overlap) for name, method in methods.items()}
    return dict(sorted(((name, step.seconds) for name, step in steps.items()), key=lambda pair: pair[1]))
