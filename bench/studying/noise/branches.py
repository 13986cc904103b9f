"""Branches: SGD from a checkpoint at other batch sizes, many paths at once, until the loss has fallen by a factor."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from ..data import Samples
from ..question import Config

GROWTH = 1.1  # from one number of steps to the next one after which the loss is computed
DIVERGED = 10.0  # a loss from which no path comes back; smaller ones pass, at rates near the edge of stability
LIMIT, LIMIT_SCALE = 150, 100  # a few times the steps that are needed at the best rate


@dataclass(frozen=True)
class Branch:
    """What becomes of a branch.

    Attributes:
        steps: until the mean over the paths of the loss on all samples reaches the goal, interpolated between the two
            times around it; None if it does not.
        loss: the last one; None if it is not finite.
        ends: a model for each path.
    """

    steps: float | None
    loss: float | None
    ends: list[nn.Module]


def branch(model: nn.Module, samples: Samples, config: Config) -> Branch:
    """`paths` of SGD at a constant rate `lr` whose batches are drawn with replacement, until `goal` times the loss."""

    def loss(weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (inputs,)), labels)

    paths, size, lr = config["paths"], config["batch_size"], config["lr"]
    generator = torch.Generator().manual_seed(config["batch_seed"])
    gradients, losses = vmap(grad(loss)), vmap(lambda weights: loss(weights, samples.inputs, samples.labels))
    weights = {name: weight.detach().expand(paths, *weight.shape) for name, weight in model.named_parameters()}
    steps, found = 0, None
    before = start = now = losses(weights).mean().item()
    for following in times(size):
        for _ in range(following - steps):
            index = torch.randint(len(samples), (paths, size), generator=generator)
            of_batch = gradients(weights, samples.inputs[index], samples.labels[index])
            weights = {name: weight - lr * of_batch[name] for name, weight in weights.items()}
        now = losses(weights).mean().item()
        if now <= config["goal"] * start:
            share = math.log(before / (config["goal"] * start)) / math.log(before / now)
            found = steps + share * (following - steps)
        if found is not None or not now <= DIVERGED:  # also if it is NaN
            break
        steps, before = following, now
    ends = [_with(model, {name: weight[path] for name, weight in weights.items()}) for path in range(paths)]
    return Branch(found, now if math.isfinite(now) else None, ends)


def times(batch_size: int) -> list[int]:
    """Numbers of steps after which the loss is computed."""
    limit = LIMIT * (1 + LIMIT_SCALE / batch_size)
    found = [1]
    while found[-1] < limit:
        found.append(max(found[-1] + 1, int(GROWTH * found[-1])))
    return found


def _with(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with these weights."""
    found = copy.deepcopy(model)
    found.load_state_dict(weights)
    return found
