"""What steps of RGD do to the loss of their batch and to that of all samples, to first order and at their best rate."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rgd_ext
from rgd_ext import Rayleigh, Spectral, Trace
from rgd_ext.metric import Epsilon

from .data import Samples
from .sampling.moments import of_batch
from .sampling.steps import Loss

POLICIES: dict[str, Epsilon] = {
    f"{policy.__name__}({fraction})": policy(fraction)
    for policy, fraction in ((Spectral, 0.5), (Spectral, 0.9), (Trace, 0.5), (Rayleigh, 0.5), (Rayleigh, 0.9))
}
BATCH_SIZE, DRAWS = 50, 8


def compare(model: nn.Module, samples: Samples, generator: torch.Generator) -> dict[str, float]:
    """Steps along d = (I - eps D) g, with g and D of all samples or of batches drawn from them, by policy.

    Returns:
        epsilon NAME: eps lambda_max(D) of all samples; above 1, I - eps D has negative eigenvalues.
        slope NAME: <g, d> / |g|^2 of all samples, the decrease of their loss to first order, in units of that by SGD's
            step at the same rate.
        gain NAME: by how much the best rate lowers that loss along d, over the same along g.
        epsilon of batches NAME, slope of batches NAME: means over the batches, of the batches' losses.
        slope beyond NAME: that of the loss of all samples, whose gradient is mu, along the batches' steps: the mean of
            <mu, d> over that of <mu, g>.
    """
    whole, loss = of_batch(model, samples), Loss(model, samples)
    start = 1 / whole.largest_eigenvalue
    _, decrease = loss.best_step(whole.gradient[None], start)
    batches = [samples[torch.randperm(len(samples), generator=generator)[:BATCH_SIZE]] for _ in range(DRAWS)]
    moments = [of_batch(model, batch) for batch in batches]
    found = {}
    for name, policy in POLICIES.items():
        direction, epsilon = step(model, samples, policy)
        steps = [step(model, batch, policy) for batch in batches]
        pairs = [(each.gradient, along) for each, (along, _) in zip(moments, steps, strict=True)]
        found |= {
            f"epsilon {name}": epsilon * whole.largest_eigenvalue,
            f"slope {name}": slope(whole.gradient, direction),
            f"gain {name}": loss.best_step(direction[None], start)[1] / decrease,
            f"epsilon of batches {name}": fmean(
                epsilon * each.largest_eigenvalue for each, (_, epsilon) in zip(moments, steps, strict=True)
            ),
            f"slope of batches {name}": fmean(slope(*pair) for pair in pairs),
            f"slope beyond {name}": (
                sum(whole.gradient @ along for _, along in pairs) / sum(whole.gradient @ each for each, _ in pairs)
            ).item(),
        }
    return found


def step(model: nn.Module, samples: Samples, policy: Epsilon) -> tuple[Tensor, float]:
    """The direction (I - eps D) g of the samples, (d,), as RGD computes it, and eps."""
    with rgd_ext.precondition(model, epsilon=policy) as handle:
        model.zero_grad()
        cross_entropy(model(samples.inputs), samples.labels).backward()
        direction = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        epsilon = handle.stats.epsilon.item()
    model.zero_grad()
    return direction, epsilon


def slope(gradient: Tensor, direction: Tensor) -> float:
    """<g, d> / |g|^2."""
    return (gradient @ direction / gradient.square().sum()).item()
