"""What a configuration trains on and is evaluated on: samples with their given labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import Samples, Sources
from .data.corruption import corrupted
from .data.formats import CLASSES
from .question import Config


class Seeds(NamedTuple):
    """Of independent generators."""

    weights: int
    batches: int
    training_labels: int
    validation_labels: int


@dataclass(frozen=True)
class Task:
    """A problem of classification.

    Attributes:
        train: with the labels that are given.
        evaluation: the validation samples with given labels, or the test samples with the true ones.
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
        ValueError: if `evaluate` is neither "validation" nor "test".
    """
    split, seeds = sources.split(config["data"], config["samples"]), seeds_of(config)
    train = _relabelled(split.train, config["labels"], seeds.training_labels)
    if config["evaluate"] == "test":
        return Task(train, split.test)
    if config["evaluate"] == "validation":
        return Task(train, _relabelled(split.validation, config["labels"], seeds.validation_labels))
    raise ValueError(f'evaluate {config["evaluate"]!r}: pass "validation" or "test"')


def _relabelled(samples: Samples, kind: str, seed: int) -> Samples:
    labels, _ = corrupted(samples.labels, kind, seed)
    return replace(samples, labels=labels)
