"""Wrong labels, unequal classes and attributes that go with the class, as functions of the true labels and a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Without it, a seed would give numbers that are related to those of torch's generator for the same seed, which may
# be what initialises or shuffles: both are the same Mersenne twister.
STREAM = 2019


def symmetric(labels: Tensor, share: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Replace a share of the labels, rounded to whole samples, by other classes, each with the same probability.

    Those that are replaced at a smaller share, with the same seed, are replaced at a larger one too.

    Args:
        labels: (N,), from 0 to classes - 1.
        share: from 0 to 1.

    Returns:
        The labels, and which of them are wrong, both (N,).

    Raises:
        ValueError: if the share, the number of classes or a label is out of range.
    """
    generator = _generator(seed)
    wrong = _chosen(labels, share, classes, generator)
    shift = torch.from_numpy(generator.randint(1, classes, size=len(labels)))
    return torch.where(wrong, (labels + shift) % classes, labels), wrong


def pairwise(labels: Tensor, share: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Like `symmetric`, but the class c is always replaced by (c + 1) mod classes. The same samples are chosen."""
    wrong = _chosen(labels, share, classes, _generator(seed))
    return torch.where(wrong, (labels + 1) % classes, labels), wrong


def imbalanced(labels: Tensor, ratio: float, classes: int, seed: int) -> Tensor:
    """Indices of a subset whose class sizes fall geometrically, from class 0 to the last one by `ratio` in all.

    It is as large as the samples allow ("long-tailed" data of Cui et al., 2019).

    Args:
        labels: (N,), from 0 to classes - 1.
        ratio: the size of the largest class divided by that of the smallest one, at least 1.

    Returns:
        In ascending order, int64.

    Raises:
        ValueError: if the ratio, the number of classes or a label is out of range, or a class would be empty.
    """
    _check(labels, classes)
    if not 1 <= ratio < float("inf"):
        raise ValueError(f"ratio must be finite and at least 1, not {ratio}")
    fall = ratio ** -(torch.arange(classes, dtype=torch.float64) / (classes - 1))
    sizes = ((labels.bincount(minlength=classes) / fall).min() * fall).round().long()
    if sizes.min() < 1:
        raise ValueError(f"a class would be empty: {len(labels)} labels are too few for the ratio {ratio}")
    order = torch.from_numpy(_generator(seed).permutation(len(labels)))
    kept = [order[labels[order] == label][:size] for label, size in enumerate(sizes.tolist())]
    return torch.cat(kept).sort().values


def correlated(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Which samples have an attribute that goes with the class, (N,), bool.

    It is `share` of each class of the upper half and 1 - `share` of each other one, rounded to whole samples.

    Raises:
        ValueError: if the share, the number of classes or a label is out of range.
    """
    _check(labels, classes)
    _check_share(share)
    order = torch.from_numpy(_generator(seed).permutation(len(labels)))
    marked = torch.zeros_like(labels, dtype=torch.bool)
    for label in range(classes):
        members = order[labels[order] == label]
        of_class = share if label >= classes // 2 else 1 - share
        marked[members[: round(of_class * len(members))]] = True
    return marked


def _generator(seed: int) -> np.random.RandomState:
    return np.random.RandomState([seed, STREAM])


def _check(labels: Tensor, classes: int) -> None:
    if classes < 2:
        raise ValueError(f"classes must be at least 2, not {classes}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}, not {labels.min()} to {labels.max()}")


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, not {share}")


def _chosen(labels: Tensor, share: float, classes: int, generator: np.random.RandomState) -> Tensor:
    """Which labels are to be replaced: a random share of them."""
    _check(labels, classes)
    _check_share(share)
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    chosen[generator.permutation(len(labels))[: round(share * len(labels))]] = True
    return chosen
