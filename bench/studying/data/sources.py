"""The data of the study: digits of scikit-learn, and published sets of which a folder of the user has the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

from .published import PUBLISHED, DataSet, found_in, load

DIGITS = "digits"
DIGITS_TEST = 497
VALIDATION = {DIGITS: 300}
USUAL_VALIDATION = 2000


@dataclass(frozen=True)
class Samples:
    """Images and their labels.

    Attributes:
        inputs: (N, channels, height, width), float32 in [-1, 1].
        labels: (N,), int64 from 0 to 9.
        groups: of which accuracies are wanted apart, (N,), or None if they are those of the labels.
    """

    inputs: Tensor
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Samples:
        groups = None if self.groups is None else self.groups[index]
        return Samples(self.inputs[index], self.labels[index], groups)


@dataclass(frozen=True)
class Split:
    """What a training has: disjoint sets."""

    train: Samples
    validation: Samples
    test: Samples


@dataclass(frozen=True)
class Pixels:
    """Images as they are stored, which takes a quarter of the memory of float32, with values from 0 to `white`."""

    values: NDArray[np.generic]
    labels: NDArray[np.generic]
    white: int

    def __getitem__(self, index: NDArray[np.intp]) -> Pixels:
        return Pixels(self.values[index], self.labels[index], self.white)

    def samples(self) -> Samples:
        """The same images as a training takes them."""
        inputs = torch.tensor(self.values, dtype=torch.float32).mul_(2 / self.white).sub_(1)
        return Samples(inputs, torch.tensor(self.labels, dtype=torch.int64))


class Sources:
    """The data sets that are there, of which each is read when it is first asked for.

    Args:
        folders: those with the files of published data sets.
        data_sets: what they may have.

    Attributes:
        names: "digits", and the data sets that the folders have.

    Raises:
        ValueError: if a folder has none of the data sets, or a file that differs from the published one.
    """

    def __init__(self, folders: Sequence[Path] = (), data_sets: Sequence[DataSet] = PUBLISHED) -> None:
        found = [(folder, data_set) for folder in folders for data_set in found_in(folder, data_sets)]
        self._places = {data_set.name: (folder, data_set) for folder, data_set in found}
        self._pixels: dict[str, tuple[Pixels, Pixels]] = {}
        self.names = (DIGITS, *self._places)

    def load(self, name: str) -> tuple[Samples, Samples]:
        """The training set and the test set, as published; of digits, which are published as one, a fixed split.

        Raises:
            ValueError: if no data set of that name is there.
        """
        train, test = self._stored(name)
        return train.samples(), test.samples()

    def split(self, name: str, samples: int) -> Split:
        """That many training samples, a validation set and the test set, the same at every call.

        Both are taken from the training set of `load`, stratified. A larger training set contains the smaller ones.

        Raises:
            ValueError: if no data set of that name is there, or it has fewer samples.
        """
        train, test = self._stored(name)
        order = stratified_order(train.labels)
        validation, rest = np.split(order, [VALIDATION.get(name, USUAL_VALIDATION)])
        if not 1 <= samples <= len(rest):
            raise ValueError(f"{name} has 1 to {len(rest)} training samples beside the validation set, not {samples}")
        chosen = rest[stratified_order(train.labels[rest])[:samples]]
        return Split(train[chosen].samples(), train[validation].samples(), test.samples())

    def _stored(self, name: str) -> tuple[Pixels, Pixels]:
        if name not in self.names:
            raise ValueError(f"no data set {name!r} is there, only {', '.join(self.names)}; name a folder that has it")
        if name not in self._pixels:
            self._pixels[name] = digits() if name == DIGITS else _published(*self._places[name])
        return self._pixels[name]


def digits() -> tuple[Pixels, Pixels]:
    """A training set and a test set of the 1,797 digits of scikit-learn, stratified."""
    bunch = load_digits()
    everything = Pixels(bunch.images[:, None], bunch.target, white=16)
    test, train = np.split(stratified_order(bunch.target), [DIGITS_TEST])
    return everything[train], everything[test]


def _published(folder: Path, data_set: DataSet) -> tuple[Pixels, Pixels]:
    train, test = load(folder, data_set)
    return Pixels(*train, white=255), Pixels(*test, white=255)


def stratified_order(labels: NDArray[np.generic]) -> NDArray[np.intp]:
    """Indices of all samples in a fixed random order, any beginning of which has the shares of the classes.

    They differ by a sample or two at most from those of all labels, (N,): of n samples of a class, the k-th is put at
    the share (k - 1/2) / n of the order.
    """
    # The numbers of RandomState, unlike those of newer generators, are promised to stay the same in all versions.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = labels[shuffled] == label
        place[members] = (np.arange(members.sum()) + 0.5) / members.sum()
    return shuffled[np.argsort(place, kind="stable")]
