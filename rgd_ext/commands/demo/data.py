"""Scikit-learn's handwritten digits, which are installed with it, noise on their labels, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TRAIN_SIZE = 1280
CLASSES = 10
BATCH_SIZE = 64


@dataclass(frozen=True)
class Digits:
    """Images of shape (N, 1, 8, 8) in [-1, 1] and their labels; those of the test set are always the true ones.

    Attributes:
        mislabelled: which training labels were replaced by wrong ones, shape (TRAIN_SIZE,).
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mislabelled: Tensor


def load(noise: float, seed: int) -> Digits:
    """The 1,797 digits in a fixed stratified split, a fraction `noise` of whose training labels are made wrong."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), train_size=TRAIN_SIZE, stratify=digits.target, random_state=0)
    given, mislabelled = corrupt(labels[train], noise, seed)
    return Digits(images[train], given, images[test], labels[test], mislabelled)


def corrupt(labels: Tensor, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Replace a fraction of the labels by another class; the result is a function of the seed.

    Returns:
        The labels, and which of them were replaced.
    """
    generator = _generator(seed, stream=0)
    replaced = torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]
    mislabelled = torch.zeros(len(labels), dtype=torch.bool)
    mislabelled[replaced] = True
    shifts = torch.randint(1, CLASSES, labels.shape, generator=generator)
    return torch.where(mislabelled, (labels + shifts) % CLASSES, labels), mislabelled


def shuffled_batches(epochs: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """For each epoch, its batches: the indices of all training samples in an order that depends on the seed."""
    generator = _generator(seed, stream=1)
    for _ in range(epochs):
        yield torch.randperm(TRAIN_SIZE, generator=generator).split(BATCH_SIZE)


def _generator(seed: int, stream: int) -> torch.Generator:
    """One of two generators for each seed.

    From the same numbers, the samples of the first batches would be those with wrong labels.
    """
    return torch.Generator().manual_seed(2 * seed + stream)
