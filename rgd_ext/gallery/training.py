"""Training of the demo's MLP with RGD, to look at while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..demo import optimizers
from ..demo.data import TRAIN_SIZE, Digits
from ..demo.models import mlp
from ..demo.training import BATCH_SIZE
from ..metric import Stats

OPTIMIZER = "RGD Spectral(0.5)"
LEARNING_RATE = optimizers.LEARNING_RATES["MLP"]
STEPS_PER_EPOCH = TRAIN_SIZE // BATCH_SIZE
TERMS = f"MLP, {OPTIMIZER}, batch size {BATCH_SIZE}, lr {LEARNING_RATE:g}, momentum {optimizers.MOMENTUM}"


def initial_model() -> nn.Module:
    """The MLP in float64, so that small eigenvalues don't drown in rounding; the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mlp().double()


def train(
    model: nn.Module, digits: Digits, epochs: int, after_epoch: Callable[[], None]
) -> Iterator[tuple[Tensor, Stats]]:
    """Train `model`; yields after each step which samples were in the batch, and what the metric knows of it."""
    images = digits.train_images.double()
    optimizer = optimizers.build(OPTIMIZER, model, LEARNING_RATE)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=shuffle).split(BATCH_SIZE):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
            yield batch, optimizer.preconditioner.stats
        after_epoch()
