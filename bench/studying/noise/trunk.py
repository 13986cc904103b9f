"""The trainings whose gradients are examined, and from which branches start."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

import rgd_ext
from rgd_ext.metric.noise import NoiseScale

from ..data import Samples, Sources
from ..question import Config
from ..task import task_of
from ..training import models_along

POINTS = (50, 200, 600)  # steps of a trunk after which it is examined
TRUNK = {"method": "SGD", "lr": 0.1, "momentum": 0.0, "batch_size": 50, "steps": POINTS[-1], "evaluate": "test"}


@dataclass(frozen=True)
class Checkpoint:
    """A trunk after some steps.

    Attributes:
        model: it is left as it is.
        samples: those of the training.
        running: the noise scale of the batches so far, as `rgd_ext.Monitor` shows it; None if it has no estimate.
    """

    model: nn.Module
    samples: Samples
    running: float | None


def checkpoint_of(config: Config, sources: Sources) -> Checkpoint:
    """The checkpoint from which a configuration starts, after `step` steps at a constant rate."""
    names = ("data", "samples", "labels", "model", "seed")
    return _trunk(sources, **{name: config[name] for name in names})[config["step"]]


@lru_cache(maxsize=64)  # all that a study needs, since the searches for rates go on by turns
def _trunk(sources: Sources, **config: str | int) -> dict[int, Checkpoint]:
    """The checkpoints at `POINTS`."""
    training = TRUNK | config
    task = task_of(training, sources)
    models, running, found = models_along(training, task, range(POINTS[-1] + 1)), NoiseScale(), {}
    with rgd_ext.observe(next(models)) as handle:
        for number, model in enumerate(models, 1):
            stats = handle.stats
            running.add(stats.batch_size, stats.squared_grad_norm.item(), stats.trace.item())
            if number in POINTS:
                found[number] = Checkpoint(copy.deepcopy(model), task.train, running.value)
    return found
