"""Scikit-learn's handwritten digits: real images that come with the package, and label noise for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TRAIN_SIZE = 1280
CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images of shape (N, 1, 8, 8) in [-1, 1] and their labels; the test part is never changed.

    Attributes:
        mislabelled: which training labels were replaced, shape (TRAIN_SIZE,).
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mislabelled: Tensor


def load(noise: float, seed: int) -> Digits:
    """The 1,797 digits in a fixed stratified split, with the fraction `noise` of the training labels made wrong."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), train_size=TRAIN_SIZE, stratify=digits.target, random_state=0)
    given, mislabelled = corrupt(labels[train], noise, seed)
    return Digits(images[train], given, images[test], labels[test], mislabelled)


def corrupt(labels: Tensor, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Replace a fraction of the labels by another class, the same ones for the same seed.

    Returns:
        The labels, and which of them were replaced.
    """
    generator = torch.Generator().manual_seed(seed)
    replaced = torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]
    mislabelled = torch.zeros(len(labels), dtype=torch.bool)
    mislabelled[replaced] = True
    shifts = torch.randint(1, CLASSES, labels.shape, generator=generator)
    return torch.where(mislabelled, (labels + shifts) % CLASSES, labels), mislabelled
