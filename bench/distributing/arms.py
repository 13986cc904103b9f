"""Training steps of several processes: SGD by DistributedDataParallel or FSDP2, and RGD with a process group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rgd_ext

from ..training.arms import OURS, Arm, ordinary, rgd, sgd
from ..training.peers import FRACTION, Backward

EVERY = 10
FSDP2 = ", FSDP2"
AMORTISED = f"RGD Spectral, every={EVERY}"
# Of these, the directions are compared with those of one process.
EXACT = {"RGD Rayleigh": rgd_ext.Rayleigh(FRACTION), "RGD Spectral": rgd_ext.Spectral(FRACTION)}
EXACT[f"RGD Rayleigh{FSDP2}"] = EXACT["RGD Rayleigh"]


def over_ddp(model: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """Forward, loss and backward of the model in a DistributedDataParallel."""
    return ordinary(DistributedDataParallel(model), x, y)


def sharded(optimizer: Callable[[nn.Module], torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a model of which each process has shards: a group for each block, and one for the rest."""
    for container in (*model.children(), model):
        for part in container if isinstance(container, (nn.Sequential, nn.ModuleList)) else ():
            if any(True for _ in part.parameters()):
                fully_shard(part)
    fully_shard(model)
    return optimizer(model)


def base_of(arm: str) -> str:
    """The arm of SGD with which an arm is compared."""
    return f"SGD{FSDP2}" if arm.endswith(FSDP2) else "SGD"


def arms(size: int) -> dict[str, Arm]:
    """The arms of so many processes by name; one process alone has RGD without a group, too."""

    def together(**options: object) -> Arm:
        return Arm(partial(rgd, process_group=distributed.group.WORLD, **options))

    unverified = together(epsilon=EXACT["RGD Rayleigh"], verify=False)  # a sharded model cannot be verified
    found = {
        "SGD": Arm(sgd, over_ddp),
        "RGD local": together(epsilon=rgd_ext.Rayleigh(FRACTION), mode="local"),
        "RGD Rayleigh": together(epsilon=EXACT["RGD Rayleigh"]),
        "RGD Spectral, bound": together(epsilon=rgd_ext.Spectral(FRACTION, across_ranks="bound")),
        AMORTISED: together(epsilon=rgd_ext.Spectral(FRACTION, every=EVERY)),
        "RGD Spectral": together(epsilon=EXACT["RGD Spectral"]),
        f"SGD{FSDP2}": Arm(partial(sharded, sgd)),
        f"RGD Rayleigh{FSDP2}": Arm(partial(sharded, unverified.optimizer)),
    }
    return found | ({"RGD Rayleigh, no group": OURS["RGD Rayleigh"]} if size == 1 else {})
