"""What a method is: a criterion, and an optimizer that minimises it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rgd_ext

from .criteria import Choice, cross_entropy

# Of the model, the learning rate and the momentum.
MakeOptimizer = Callable[[nn.Module, float, float], torch.optim.Optimizer]


class Step:
    """A training step, (inputs, labels) -> the outputs before it; a context manager that removes the model's capture.

    Args:
        model: it is trained in place.
        optimizer: of the model's parameters; it gets a closure, which it may call more than once.
        criterion: what is minimised.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[..., Tensor]) -> None:
        self._model, self._optimizer, self._criterion = model, optimizer, criterion

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *exception: object) -> None:
        handle = rgd_ext.handle_of(self._model)
        if handle is not None:
            handle.remove()

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Make a step on the batch, labels (B,), and return the outputs (B, classes) before it."""
        calls = []

        def closure() -> Tensor:
            self._optimizer.zero_grad()
            calls.append(self._model(inputs))
            loss = self._criterion(calls[-1], labels)
            loss.backward()
            return loss

        self._optimizer.step(closure)
        return calls[0].detach()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next steps."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        optimizer: makes the optimizer of a model.
        criterion: chooses what is minimised by the numbers of training samples of the classes.
        gradients: how many are computed in a step.
    """

    optimizer: MakeOptimizer
    criterion: Choice = cross_entropy
    gradients: int = 1

    def start(self, model: nn.Module, lr: float, momentum: float, counts: Tensor) -> Step:
        """The step of this method for `model`; `counts` are the training samples of each class, (classes,)."""
        return Step(model, self.optimizer(model, lr, momentum), self.criterion(counts))
