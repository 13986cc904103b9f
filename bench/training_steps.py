"""Ways to make a training step: SGD, ours, and the peers."""

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


def ordinary(model: nn.Module, x: Tensor, y: Tensor, autocast: bool = False) -> Backward:
    def backward() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            value = loss(model(x), y)
        value.backward()

    return backward


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LR)


def spectral(model: nn.Module) -> torch.optim.Optimizer:
    return rgd_ext.RGD(model, LR, epsilon=rgd_ext.Spectral(FRACTION), batch_norm="contribution")


def rayleigh(model: nn.Module) -> torch.optim.Optimizer:
    return rgd_ext.RGD(model, LR, epsilon=rgd_ext.Rayleigh(FRACTION), batch_norm="contribution")


@dataclass(frozen=True)
class Arm:
    """An optimizer, what leaves its direction in `.grad`, and the arm of ours whose direction that is."""

    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    backward: Callable[[nn.Module, Tensor, Tensor], Backward] = ordinary
    same_as: str | None = None


OURS = {"SGD": Arm(sgd), "RGD Spectral": Arm(spectral), "RGD Rayleigh": Arm(rayleigh)}
UNDER_AUTOCAST = {name: replace(arm, backward=partial(ordinary, autocast=True)) for name, arm in OURS.items()}
PEERS = {
    "Opacus, Rayleigh": Arm(sgd, peers.opacus, "RGD Rayleigh"),
    "vmap(grad), Rayleigh": Arm(sgd, peers.torch_func, "RGD Rayleigh"),
    "BackPACK, Rayleigh": Arm(sgd, peers.backpack, "RGD Rayleigh"),
    "TorchJD, Spectral": Arm(sgd, peers.torchjd, "RGD Spectral"),
}


class Training:
    """An arm on a model of its own; a call makes a step, from zero_grad to the optimizer's."""

    def __init__(self, arm: Arm, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = arm.optimizer(self.model)
        self.backward = arm.backward(self.model, x, y)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def direction(self) -> list[Tensor]:
        """What the last step went along."""
        return [parameter.grad for parameter in self.model.parameters()]
