"""Training: the four optimizers side by side, from the same weights and on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rgd_ext

from . import optimizers
from .data import Digits

BATCH_SIZE = 64


@dataclass
class History:
    """What one optimizer did: lists with one entry per step or per epoch.

    Attributes:
        seconds: of each step, from zero_grad to the end of the optimizer's step.
        losses: of each step.
        mislabelled: which samples of the step's batch have a wrong label.
        epsilons, weights: of each step of RGD, epsilon and the B w_i.
        largest_eigenvalues: lambda_max(D) of each step of RGD, where the Gramian is there.
        test_accuracies: after each epoch.
        train_accuracy: at the end, on the labels as given.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    epsilons: list[float] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    largest_eigenvalues: list[float] = field(default_factory=list)
    mislabelled: list[list[bool]] = field(default_factory=list)
    test_accuracies: list[float] = field(default_factory=list)
    train_accuracy: float = 0.0


class Learner:
    """A model, its optimizer and their history."""

    def __init__(self, optimizer: str, model: nn.Module, lr: float) -> None:
        self.model = model
        self.optimizer = optimizers.build(optimizer, model, lr)
        self.history = History()

    def epoch(self, digits: Digits, batches: tuple[Tensor, ...]) -> None:
        """A step on each batch, then the test."""
        for batch in batches:
            self._step(digits.train_images[batch], digits.train_labels[batch])
            self._observe(digits.mislabelled[batch])
        self.history.test_accuracies.append(self.accuracy(digits.test_images, digits.test_labels))

    def _step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.history.seconds.append(time.perf_counter() - start)
        self.history.losses.append(loss.item())

    def _observe(self, mislabelled: Tensor) -> None:
        self.history.mislabelled.append(mislabelled.tolist())
        if not isinstance(self.optimizer, rgd_ext.RGD):
            return
        stats = self.optimizer.preconditioner.stats
        self.history.epsilons.append(stats.epsilon.item())
        self.history.weights.append((stats.batch_size * stats.weights).tolist())
        if stats.largest_eigenvalue is not None:
            self.history.largest_eigenvalues.append(stats.largest_eigenvalue.item())

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of `images` the model classifies as `labels`."""
        return (self.model(images).argmax(1) == labels).float().mean().item()


def train(
    make_model: Callable[[], nn.Module], digits: Digits, lr: float, epochs: int, seed: int, after_epoch: Callable
) -> dict[str, History]:
    """Train a model with each optimizer, an epoch of each in turn; `seed` gives the weights and the batches."""
    learners = {}
    for name in optimizers.NAMES:
        torch.manual_seed(seed)
        learners[name] = Learner(name, make_model(), lr)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        batches = torch.randperm(len(digits.train_labels), generator=shuffle).split(BATCH_SIZE)
        for learner in learners.values():
            learner.epoch(digits, batches)
        after_epoch()
    for learner in learners.values():
        learner.history.train_accuracy = learner.accuracy(digits.train_images, digits.train_labels)
    return {name: learner.history for name, learner in learners.items()}
