"""Ways to make a training step: SGD, RGD, and other packages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import rgd_ext

from . import peers
from .models import loss
from .peers import FRACTION, Backward

# So small that all arms stay on about the same weights, with gradients of the same size.
LR = 1e-6
# In a training, steps follow each other. A change of arms disturbs caches and heap, which is no part of a step's price,
# so one step before the timed ones is not timed.
CONSECUTIVE = 4


def ordinary(model: nn.Module, x: Tensor, y: Tensor, autocast: bool = False) -> Backward:
    """Forward, loss and backward."""

    def backward() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            value = loss(model(x), y)
        value.backward()

    return backward


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LR)


def rgd(model: nn.Module, **options: object) -> rgd_ext.RGD:
    """RGD with options of its constructor."""
    return rgd_ext.RGD(model, LR, batch_norm="contribution", **options)


@dataclass(frozen=True)
class Arm:
    """An optimizer, and the function that makes the backward of a model on a batch.

    The backward leaves a direction in `.grad`. A peer is compared with `same_as`, the arm of ours with its direction.
    """

    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    backward: Callable[..., Backward] = ordinary
    same_as: str | None = None


OURS = {
    "SGD": Arm(sgd),
    "RGD Spectral": Arm(partial(rgd, epsilon=rgd_ext.Spectral(FRACTION))),
    "RGD Rayleigh": Arm(partial(rgd, epsilon=rgd_ext.Rayleigh(FRACTION))),
}
UNDER_AUTOCAST = {name: replace(arm, backward=partial(ordinary, autocast=True)) for name, arm in OURS.items()}
PEERS = {
    "Opacus, Rayleigh": Arm(sgd, peers.opacus, "RGD Rayleigh"),
    "vmap(grad), Rayleigh": Arm(sgd, peers.torch_func, "RGD Rayleigh"),
    "BackPACK, Rayleigh": Arm(sgd, peers.backpack, "RGD Rayleigh"),
    "TorchJD, Spectral": Arm(sgd, peers.torchjd, "RGD Spectral"),
}


def step(optimizer: torch.optim.Optimizer, backward: Backward) -> None:
    """A training step, from `zero_grad` to the step of the optimizer."""
    optimizer.zero_grad()
    backward()
    optimizer.step()


def repeat(step: Callable[[], None]) -> None:
    """Make CONSECUTIVE steps."""
    for _ in range(CONSECUTIVE):
        step()


class Training:
    """An arm on its own copy of a model; a call makes a step."""

    def __init__(self, arm: Arm, model: nn.Module, *batch: Tensor) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = arm.optimizer(self.model)
        self.backward = arm.backward(self.model, *batch)

    def __call__(self) -> None:
        step(self.optimizer, self.backward)

    def direction(self) -> list[Tensor]:
        """The direction of the last step."""
        return [parameter.grad for parameter in self.model.parameters()]
