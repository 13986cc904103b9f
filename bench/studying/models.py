"""The models of the study. None has batch normalisation, since the covariance D needs independent samples."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import nn

Shape = tuple[int, int, int]  # of an image: channels, height, width


def mlp(shape: Shape, classes: int) -> nn.Module:
    """Two hidden layers, of 64 units for images of 8x8 pixels and of 128 for larger ones."""
    width = 64 if shape[1:] == (8, 8) else 128
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def small_mlp(shape: Shape, classes: int) -> nn.Module:
    """A hidden layer of 16 units, smooth in the weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), 16), nn.Tanh(), nn.Linear(16, classes))


def cnn(shape: Shape, classes: int) -> nn.Module:
    """Two convolutions with group normalisation, and a linear layer; it halves images larger than 8x8 pixels first."""
    channels, height, width = shape
    stride = 1 if (height, width) == (8, 8) else 2
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // stride // 4) * (width // stride // 4), classes),
    )


def small_cnn(shape: Shape, classes: int) -> nn.Module:
    """Two convolutions and a linear layer, with 666 weights for ten classes and grey images of 8x8 pixels."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * (height // 4) * (width // 4), classes),
    )


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "MLP": mlp,
    "small MLP": small_mlp,
    "CNN": cnn,
    "small CNN": small_cnn,
}


def build(name: str, inputs_shape: Shape, classes: int) -> nn.Module:
    """A model for images of that shape, (channels, height, width). Its weights are from torch's global generator.

    Raises:
        ValueError: if there is no model of that name.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}, only {', '.join(MODELS)}")
    return MODELS[name](tuple(inputs_shape), classes)
