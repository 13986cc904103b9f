"""How well a model classifies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .data import Samples

CHUNK = 1000  # samples of a forward, so that memory does not grow with the set


def scores(model: nn.Module, samples: Samples) -> dict[str, float | None]:
    """The accuracy, the mean and the least of those on the groups, and the mean cross entropy, None if not finite.

    The groups are those of the samples, or the classes.
    """
    outputs = outputs_of(model, samples)
    correct = (outputs.argmax(1) == samples.labels).double()
    groups = samples.labels if samples.groups is None else samples.groups
    by_group = [correct[groups == group].mean() for group in groups.unique()]
    loss = cross_entropy(outputs.double(), samples.labels).item()
    return {
        "accuracy": correct.mean().item(),
        "balanced_accuracy": torch.stack(by_group).mean().item(),
        "worst_accuracy": torch.stack(by_group).min().item(),
        "loss": loss if math.isfinite(loss) else None,
    }


def accuracy(model: nn.Module, samples: Samples) -> float:
    """The share of the samples that are classified as their labels say."""
    return (outputs_of(model, samples).argmax(1) == samples.labels).double().mean().item()


@torch.no_grad()
def outputs_of(model: nn.Module, samples: Samples) -> Tensor:
    """(N, classes)."""
    return torch.cat([model(chunk) for chunk in samples.inputs.split(CHUNK)])
