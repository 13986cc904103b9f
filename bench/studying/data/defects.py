"""What is wrong with a training set, as a text: a name and a number, such as "symmetric 0.4", or "clean".

    symmetric SHARE, pairwise SHARE: so many labels are wrong;
    imbalanced RATIO: the classes are unequal, from the first to the last one by this ratio;
    contrast SHARE: so many images of the upper half of the classes are inverted, and as many of the lower half are not,
        so that for most images contrast agrees with the half. The samples to evaluate have each image in both
        contrasts, and groups, the four combinations of contrast and half.

Validation and test samples have nothing else wrong with them. With wrong labels among the validation samples, the
choice of a learning rate would be left to chance, and differences between methods would mostly be those of luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .corruption import correlated, imbalanced, pairwise, symmetric
from .formats import CLASSES
from .sources import Samples

Change = Callable[[Samples, float, int], Samples]  # of samples, with the number and a seed


def relabelled(corrupt: Callable[[Tensor, float, int, int], tuple[Tensor, Tensor]]) -> Change:
    """With labels that `corrupt` makes wrong."""

    def change(samples: Samples, share: float, seed: int) -> Samples:
        return replace(samples, labels=corrupt(samples.labels, share, CLASSES, seed)[0])

    return change


def unequal(samples: Samples, ratio: float, seed: int) -> Samples:
    """A part of them with unequal classes."""
    return samples[imbalanced(samples.labels, ratio, CLASSES, seed)]


def with_contrast(samples: Samples, share: float, seed: int) -> Samples:
    """Some of them inverted, by class."""
    return _inverted(samples, correlated(samples.labels, share, CLASSES, seed))


def in_both_contrasts(samples: Samples) -> Samples:
    """Each of them as it is, and then inverted."""
    count = len(samples)
    return _inverted(samples[torch.arange(count).repeat_interleave(2)], torch.arange(2 * count) % 2 == 1)


def _inverted(samples: Samples, inverted: Tensor) -> Samples:
    """Those samples inverted, (N,), with the groups of contrast and half."""
    signs = torch.where(inverted, -1.0, 1.0)
    upper = samples.labels >= CLASSES // 2
    return Samples(samples.inputs * signs.view(-1, 1, 1, 1), samples.labels, 2 * upper.long() + inverted)


@dataclass(frozen=True)
class Defect:
    """Attributes:
    words: a description, with a place for the number.
    train: what it does to the training set.
    evaluation: what it does to the validation and the test set.
    """

    words: str
    train: Change
    evaluation: Callable[[Samples], Samples] = lambda samples: samples


DEFECTS = {
    "symmetric": Defect("{:.0%} wrong labels (symmetric)", relabelled(symmetric)),
    "pairwise": Defect("{:.0%} wrong labels (pairwise)", relabelled(pairwise)),
    "imbalanced": Defect("unequal classes ({:g} to 1)", unequal),
    "contrast": Defect("spurious contrast ({:.0%})", with_contrast, in_both_contrasts),
}
CLEAN = Defect("clean labels", lambda samples, *_: samples)


def defect(text: str) -> tuple[Defect, float]:
    """The defect that a text names, and its number.

    Raises:
        ValueError: if the text is another one.
    """
    if text == "clean":
        return CLEAN, 0.0
    name, _, number = text.partition(" ")
    try:
        return DEFECTS[name], float(number)
    except (KeyError, ValueError):
        known = ", ".join(f'"{name} NUMBER"' for name in DEFECTS)
        raise ValueError(f'labels must be "clean" or one of {known}, not {text!r}') from None


def sort_key(text: str) -> tuple[int, float]:
    """A key by which no defect comes first, and then those of one kind by their numbers."""
    found, number = defect(text)
    return [CLEAN, *DEFECTS.values()].index(found), number


def described(text: str) -> str:
    """A defect in words, such as "40 % wrong labels (symmetric)"."""
    found, number = defect(text)
    return found.words.format(number).replace("%", " %")
