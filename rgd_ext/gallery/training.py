"""Training of the demo's MLP with RGD, to look at while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..demo import optimizers
from ..demo.data import Digits
from ..demo.models import mlp
from ..demo.training import BATCH_SIZE
from ..metric import Stats

OPTIMIZER = "RGD Spectral(0.5)"
LEARNING_RATE = optimizers.LEARNING_RATES["MLP"]
TERMS = f"MLP, {OPTIMIZER}, batch size {BATCH_SIZE}, lr {LEARNING_RATE:g}, momentum {optimizers.MOMENTUM}"


def initial_model(seed: int = 0) -> nn.Module:
    """The MLP in float64, in which small eigenvalues don't drown in rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp().double()


def train(
    model: nn.Module, digits: Digits, epochs: int, after_epoch: Callable[[], None], seed: int = 0
) -> Iterator[tuple[Tensor, Stats]]:
    """Train `model`; after each step, yields which samples were in the batch and what the metric knows of it."""
    images = digits.train_images.double()
    optimizer = optimizers.build(OPTIMIZER, model, LEARNING_RATE)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=shuffle).split(BATCH_SIZE):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
            yield batch, optimizer.preconditioner.stats
        after_epoch()
