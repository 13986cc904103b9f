"""Trainings of the study: a pure function of a configuration, with all methods on the same terms.

A configuration has the entries

    data, samples: the name of the data, and how many of them to train on;
    labels: "clean", or what is wrong with the training set, such as "symmetric 0.4" (see `data.defects`);
    model, method: their names;
    lr, momentum: the first learning rate, which falls to zero along a cosine of the steps, and the momentum;
    batch_size, steps: each epoch has whole batches only, so the samples that are left over differ from epoch to epoch;
    seed: of the initial weights, the batches and the wrong labels, each by a generator of its own;
    evaluate: "validation" or "test".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .data import Samples, Sources
from .data.formats import CLASSES
from .methods import METHODS, Method, Step
from .models import build
from .question import Config
from .scores import accuracy, scores
from .task import Task, seeds_of, task_of

POINTS = 10  # of the curves; fewer if there are fewer steps
CURVE_SAMPLES = 1000  # all of them, ten times, would take as long as the training


def train(config: Config, sources: Sources) -> dict[str, Any]:
    """What a training gives: numbers, and curves with an entry for each of `POINTS` equal parts of the steps.

    None stands for what is not finite.

    Returns:
        training_losses: the mean cross entropy of the part's batches before their steps, whatever is minimised.
        accuracies: after each part, on the first `CURVE_SAMPLES` of the samples to evaluate.
        accuracy, balanced_accuracy, worst_accuracy, loss: of these at the end, as in `scores`.
        training_accuracy, training_loss: at the end, on the labels that were given, and initial_loss the one before.
        diverged: whether the weights or the loss are not finite any more. The curves end with that part.

    Raises:
        ValueError: for an unknown name, or a batch larger than the training set.
    """
    task = task_of(config, sources)
    model = initial_model(config, task)
    before = scores(model, task.train)
    with method_of(config).start(model, config["lr"], config["momentum"], task.counts) as step:
        curves = _curves(config, task, model, step)
    final, fit = scores(model, task.evaluation), scores(model, task.train)
    of_training = {
        "training_accuracy": fit["accuracy"],
        "training_loss": fit["loss"],
        "initial_loss": before["loss"],
        "diverged": None in curves["training_losses"] or final["loss"] is None,
    }
    return curves | final | of_training


def method_of(config: Config) -> Method:
    """The method that the configuration names, or ValueError."""
    if config["method"] not in METHODS:
        raise ValueError(f"method {config['method']!r}: choose one of {', '.join(METHODS)}")
    return METHODS[config["method"]]


def initial_model(config: Config, task: Task) -> nn.Module:
    """The model before training; it depends on the seed and not on the method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds_of(config).weights)
        return build(config["model"], tuple(task.train.inputs.shape[1:]), CLASSES)


def batches_of(config: Config, samples: Samples) -> Iterator[Samples]:
    """The batch of each step, all of the same size; they depend on the seed and not on the method."""
    return islice(_endless_batches(config, samples), config["steps"])


def models_along(config: Config, task: Task, points: Collection[int]) -> Iterator[nn.Module]:
    """The model after each of these numbers of steps, with a constant learning rate.

    It is one object, which the training goes on to change.
    """
    model = initial_model(config, task).eval()  # `DiffusionMatrix.from_dataset` asks for it; no module has a mode
    if 0 in points:
        yield model
    with method_of(config).start(model, config["lr"], config["momentum"], task.counts) as step:
        for number, batch in enumerate(batches_of(config, task.train), 1):
            step(batch.inputs, batch.labels)
            if number in points:
                yield model


def measured_along(
    config: Config, sources: Sources, points: Collection[int], measure: Callable[..., dict[str, Any]]
) -> dict[str, list[Any]]:
    """What `measure` gives at each of these points of a training by `models_along`, as lists by name.

    Args:
        measure: of the model, the training samples and a generator that is no one's but its own.
    """
    task = task_of(config | {"evaluate": "test"}, sources)
    generator = torch.Generator().manual_seed(config["seed"])  # not one of `seeds_of`, which the training uses
    found = [measure(model, task.train, generator) for model in models_along(config, task, points)]
    return {name: [each[name] for each in found] for name in found[0]}


def _endless_batches(config: Config, samples: Samples) -> Iterator[Samples]:
    """Epoch after epoch, each in another order."""
    size, count = config["batch_size"], len(samples)
    if size > count:
        raise ValueError(f"batch_size {size} for {count} training samples: pass at most {count}")
    generator = torch.Generator().manual_seed(seeds_of(config).batches)
    while True:
        order = torch.randperm(count, generator=generator)[: count // size * size]
        yield from (samples[index] for index in order.split(size))


def _curves(config: Config, task: Task, model: nn.Module, step: Step) -> dict[str, list[float | None]]:
    """Train; the entries of the outcome that are lists."""
    losses: list[float | None] = []
    accuracies: list[float | None] = []
    batches, steps = batches_of(config, task.train), config["steps"]
    few = task.evaluation[torch.arange(min(CURVE_SAMPLES, len(task.evaluation)))]
    ends = {round(steps * part / POINTS) for part in range(POINTS + 1)}
    for start, end in pairwise(sorted(ends)):
        rates = [config["lr"] * (1 + math.cos(math.pi * number / steps)) / 2 for number in range(start, end)]
        # The rates come first: zip stops at their end without taking another batch.
        losses.append(_part(step, zip(rates, batches, strict=False)))
        accuracies.append(accuracy(model, few))
        if losses[-1] is None:
            break
    return {"training_losses": losses, "accuracies": accuracies}


def _part(step: Step, rates_and_batches: Iterable[tuple[float, Samples]]) -> float | None:
    """Make these steps; their mean loss, or None if one diverges."""
    losses = []
    for lr, batch in rates_and_batches:
        step.set_lr(lr)
        losses.append(cross_entropy(step(batch.inputs, batch.labels), batch.labels).item())
        if not math.isfinite(losses[-1]):
            return None
    return statistics.fmean(losses)
