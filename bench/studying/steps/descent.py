"""What steps of RGD do to the loss of their batch and to that of all samples, to first order and at their best rate."""

from __future__ import annotations

from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rgd_ext
from rgd_ext import Rayleigh, Spectral, Trace
from rgd_ext.metric import Epsilon

from ..data import Samples
from .loss import Loss
from .moments import Moments, of_batch

POLICIES: dict[str, Epsilon] = {
    f"{policy.__name__}({fraction})": policy(fraction)
    for policy, fraction in ((Spectral, 0.5), (Spectral, 0.9), (Trace, 0.5), (Rayleigh, 0.5), (Rayleigh, 0.9))
}
BATCH_SIZE, DRAWS = 50, 8


class Step(NamedTuple):
    """A step along d = (I - eps D) g, with g and D of the same samples.

    Attributes:
        gradient: g, (d,).
        direction: d, (d,), as RGD computes it.
        epsilon: eps lambda_max(D). Above 1, I - eps D has negative eigenvalues.
    """

    gradient: Tensor
    direction: Tensor
    epsilon: float

    @property
    def slope(self) -> float:
        """<g, d> / |g|^2: to first order the decrease of these samples' loss, over that by SGD at the same rate."""
        return (self.gradient @ self.direction / self.gradient.square().sum()).item()


def compare(model: nn.Module, samples: Samples, generator: torch.Generator) -> dict[str, float]:
    """Steps on all samples, and on `DRAWS` batches of `BATCH_SIZE` drawn from them, by policy.

    Returns:
        epsilon NAME, slope NAME: those of the step on all samples.
        gain NAME: by how much the best rate lowers the loss of all samples along this step, over the same along g.
        epsilon of batches NAME, slope of batches NAME: means over the batches.
        slope of all NAME: that of the loss of all samples, whose gradient is mu, along the batches' steps: the mean of
            <mu, d> over the mean of <mu, g>.
    """
    whole, loss = of_batch(model, samples), Loss(model, samples)
    start = 1 / whole.largest_eigenvalue
    _, decrease = loss.best_step(whole.gradient[None], start)
    batches = [samples[torch.randperm(len(samples), generator=generator)[:BATCH_SIZE]] for _ in range(DRAWS)]
    drawn = [(batch, of_batch(model, batch)) for batch in batches]
    found = {}
    for name, policy in POLICIES.items():
        on_all, *on_batches = (step(model, *each, policy) for each in [(samples, whole), *drawn])
        along = sum(whole.gradient @ each.direction for each in on_batches)
        found |= {
            f"epsilon {name}": on_all.epsilon,
            f"slope {name}": on_all.slope,
            f"gain {name}": loss.best_step(on_all.direction[None], start)[1] / decrease,
            f"epsilon of batches {name}": fmean(each.epsilon for each in on_batches),
            f"slope of batches {name}": fmean(each.slope for each in on_batches),
            f"slope of all {name}": (along / sum(whole.gradient @ each.gradient for each in on_batches)).item(),
        }
    return found


def step(model: nn.Module, samples: Samples, moments: Moments, policy: Epsilon) -> Step:
    """The step on these samples, whose moments are given; the gradients that the model may have are lost."""
    with rgd_ext.precondition(model, epsilon=policy) as handle:
        model.zero_grad()  # the training leaves those of its last batch
        cross_entropy(model(samples.inputs), samples.labels).backward()
        direction = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        epsilon = handle.stats.epsilon.item()
    model.zero_grad()
    return Step(moments.gradient, direction, epsilon * moments.largest_eigenvalue)
