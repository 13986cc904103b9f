"""A training of the demo's MLP with RGD that can be observed step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...metric import Stats
from ..demo import optimizers
from ..demo.data import BATCH_SIZE, TRAIN_SIZE, Digits, shuffled_batches
from ..demo.models import mlp
from ..demo.training import step

OPTIMIZER = "RGD Spectral(0.5)"
LEARNING_RATE = optimizers.LEARNING_RATES["MLP"]
STEPS_PER_EPOCH = TRAIN_SIZE // BATCH_SIZE
TERMS = f"MLP, {OPTIMIZER}, batch size {BATCH_SIZE}, lr {LEARNING_RATE:g}, momentum {optimizers.MOMENTUM}"


def initial_model() -> nn.Module:
    """The MLP, the same one every time; in float64, so that rounding does not hide small eigenvalues."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mlp().double()


def train(
    model: nn.Module, digits: Digits, epochs: int, after_epoch: Callable[[], None]
) -> Iterator[tuple[Tensor, Stats]]:
    """Train `model`; yields the samples of the batch and its `Stats` after each step."""
    images = digits.train_images.double()
    optimizer = optimizers.build(OPTIMIZER, model, LEARNING_RATE)
    for batches in shuffled_batches(epochs, seed=0):
        for batch in batches:
            step(model, optimizer, images[batch], digits.train_labels[batch])
            yield batch, optimizer.preconditioner.stats  # type: ignore[attr-defined]  # it is an RGD
        after_epoch()
