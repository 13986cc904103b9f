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
from .data import Digits, shuffled_batches


@dataclass
class History:
    """What one optimizer did: lists with one entry per step or per epoch.

    Attributes:
        seconds: of each step, from zero_grad to the end of the optimizer's step.
        losses: of each step.
        mislabelled: for each step, which samples of the batch have a wrong label.
        epsilons, weights: epsilon and the weights B w_i of each step of RGD.
        largest_eigenvalues: lambda_max(D) of each step of RGD; empty where the policy needs no Gramian.
        test_accuracies: the accuracy on the test set after each epoch.
        train_accuracy: the accuracy on the training set at the end, on its labels, wrong ones included.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    epsilons: list[float] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    largest_eigenvalues: list[float] = field(default_factory=list)
    mislabelled: list[list[bool]] = field(default_factory=list)
    test_accuracies: list[float] = field(default_factory=list)
    train_accuracy: float = 0.0

    def finish(self, train_accuracy: float) -> None:
        """Note the accuracy on the training set at the end."""
        self.train_accuracy = train_accuracy


class Learner:
    """A model, its optimizer and their history."""

    def __init__(self, optimizer: str, model: nn.Module, lr: float) -> None:
        self.model = model
        self.optimizer = optimizers.build(optimizer, model, lr)
        self.history = History()

    def epoch(self, digits: Digits, batches: tuple[Tensor, ...]) -> None:
        """Take a step on each batch, then measure the accuracy on the test set."""
        for batch in batches:
            self._step(digits.train_images[batch], digits.train_labels[batch])
            self._observe(digits.mislabelled[batch])
        self.history.test_accuracies.append(self.accuracy(digits.test_images, digits.test_labels))

    def finish(self, digits: Digits) -> None:
        """Measure the accuracy on the training set, after the last epoch."""
        self.history.finish(self.accuracy(digits.train_images, digits.train_labels))

    def _step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        loss = step(self.model, self.optimizer, images, labels)
        self.history.seconds.append(time.perf_counter() - start)
        self.history.losses.append(loss.item())

    def _observe(self, mislabelled: Tensor) -> None:
        self.history.mislabelled.append(mislabelled.tolist())
        handle = rgd_ext.handle_of(self.model)
        stats = None if handle is None else handle.stats
        if stats is None or stats.epsilon is None:
            return
        self.history.epsilons.append(stats.epsilon.item())
        self.history.weights.append((stats.batch_size * stats.weights).tolist())
        if stats.largest_eigenvalue is not None:
            self.history.largest_eigenvalues.append(stats.largest_eigenvalue.item())

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of `images` the model classifies as `labels`."""
        return (self.model(images).argmax(1) == labels).float().mean().item()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """Take one step on a batch, and return its loss before the step."""
    optimizer.zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss


def train(
    make_model: Callable[[], nn.Module], digits: Digits, lr: float, epochs: int, seed: int, after_epoch: Callable
) -> dict[str, History]:
    """Train a model with each optimizer, one epoch of each in turn.

    Args:
        make_model: the model whose weights torch's random number generator initialises.
        digits: the training and the test set.
        lr: the learning rate of all optimizers.
        epochs: how many.
        seed: determines the initial weights and the batches, which are the same for all optimizers.
        after_epoch: is called after an epoch of all optimizers.

    Returns:
        The history of each optimizer, by its name.
    """
    learners = {}
    for name in optimizers.NAMES:
        torch.manual_seed(seed)
        learners[name] = Learner(name, make_model(), lr)
    for batches in shuffled_batches(epochs, seed):
        for learner in learners.values():
            learner.epoch(digits, batches)
        after_epoch()
    for learner in learners.values():
        learner.finish(digits)
    return {name: learner.history for name, learner in learners.items()}
