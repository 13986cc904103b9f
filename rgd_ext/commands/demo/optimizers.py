"""The four optimizers that are compared; they differ only in the direction of a step."""

from __future__ import annotations

import torch
from torch import nn

import rgd_ext

MOMENTUM = 0.9
# Of 0.001, 0.002, 0.005, 0.01, ... these are the ones at which plain SGD has the best test accuracy, averaged over the
# two kinds of labels. The choice favours SGD: the rates were not tuned for RGD.
LEARNING_RATES = {"MLP": 0.02, "CNN": 0.002}

# 64 / lambda_max(D) is from docs/study.md, whose data are digits, too: it gains on symmetric wrong labels, and loses on
# clean ones.
NAMES = ("SGD", "RGD Spectral(0.5)", "RGD Rayleigh(0.5)", "RGD exact Spectral(64)")


def build(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer for `model` that is called `name`, one of `NAMES`."""
    match name:
        case "SGD":
            return torch.optim.SGD(model.parameters(), lr, MOMENTUM)
        case "RGD Spectral(0.5)":
            return rgd_ext.RGD(model, lr, MOMENTUM, epsilon=rgd_ext.Spectral(0.5))
        case "RGD Rayleigh(0.5)":
            return rgd_ext.RGD(model, lr, MOMENTUM, epsilon=rgd_ext.Rayleigh(0.5))
        case "RGD exact Spectral(64)":
            return rgd_ext.RGD(model, lr, MOMENTUM, epsilon=rgd_ext.Spectral(64), inverse="exact")
    raise ValueError(f"optimizer {name!r}: choose one of {', '.join(NAMES)}")
