"""What a configuration trains on and is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import Samples, Sources
from .data.defects import defect
from .data.formats import CLASSES
from .question import Config


class Seeds(NamedTuple):
    """Of independent generators: of the initial weights, of the batches, and of what is wrong with the training set."""

    weights: int
    batches: int
    train: int


@dataclass(frozen=True)
class Task:
    """A problem of classification.

    Attributes:
        train: the training samples, with what is wrong with them.
        evaluation: the validation or the test samples.
    """

    train: Samples
    evaluation: Samples

    @property
    def counts(self) -> Tensor:
        """The training samples of each class, by the labels that are given, (classes,)."""
        return torch.bincount(self.train.labels, minlength=CLASSES)


def seeds_of(config: Config) -> Seeds:
    """They depend on the configuration's seed alone."""
    return Seeds(*map(int, np.random.SeedSequence(config["seed"]).generate_state(len(Seeds._fields))))


def task_of(config: Config, sources: Sources) -> Task:
    """The task of a configuration.

    Raises:
        ValueError: if `evaluate` is neither "validation" nor "test", or `labels` is no defect.
    """
    split, seeds = sources.split(config["data"], config["samples"]), seeds_of(config)
    found, number = defect(config["labels"])
    train = found.train(split.train, number, seeds.train)
    if config["evaluate"] == "test":
        return Task(train, found.evaluation(split.test))
    if config["evaluate"] == "validation":
        return Task(train, found.evaluation(split.validation))
    raise ValueError(f'evaluate {config["evaluate"]!r}: pass "validation" or "test"')
