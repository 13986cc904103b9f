"""Training steps of several processes: SGD by DistributedDataParallel, and RGD with a process group."""

from __future__ import annotations

from functools import partial

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import rgd_ext

from ..training.arms import OURS, Arm, ordinary, rgd, sgd
from ..training.peers import FRACTION, Backward

EVERY = 10
AMORTISED = f"RGD Spectral, every={EVERY}"
# Of these, the directions are compared with those of one process.
EXACT = {"RGD Rayleigh": rgd_ext.Rayleigh(FRACTION), "RGD Spectral": rgd_ext.Spectral(FRACTION)}


def over_ddp(model: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """Forward, loss and backward of the model in a DistributedDataParallel."""
    return ordinary(DistributedDataParallel(model), x, y)


def arms(size: int) -> dict[str, Arm]:
    """The arms of so many processes by name; one process alone has RGD without a group, too."""

    def together(**options: object) -> Arm:
        return Arm(partial(rgd, process_group=distributed.group.WORLD, **options))

    found = {
        "SGD": Arm(sgd, over_ddp),
        "RGD local": together(epsilon=rgd_ext.Rayleigh(FRACTION), mode="local"),
        "RGD Rayleigh": together(epsilon=EXACT["RGD Rayleigh"]),
        "RGD Spectral, bound": together(epsilon=rgd_ext.Spectral(FRACTION, across_ranks="bound")),
        AMORTISED: together(epsilon=rgd_ext.Spectral(FRACTION, every=EVERY)),
        "RGD Spectral": together(epsilon=EXACT["RGD Spectral"]),
    }
    return found | ({"RGD Rayleigh, no group": OURS["RGD Rayleigh"]} if size == 1 else {})
