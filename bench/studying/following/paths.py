"""Independent paths of SGD: their mean, and how far it is from the expectation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from .problems import Problem

WITH_REPLACEMENT, SHUFFLED = "with replacement", "shuffled"


@dataclass(frozen=True)
class Average:
    """The mean of independent paths at T times.

    Attributes:
        mean: (T, d).
        noise: its expected squared distance from the expectation, (T,): the trace of the unbiased covariance of the
            paths, divided by their number.
    """

    mean: Tensor
    noise: Tensor

    def squared_distance(self, curve: Tensor) -> float:
        """The squared distance of the expectation from a curve (T, d), averaged over the times.

        An unbiased estimate, which may be negative: the mean of the paths is on average as much farther away as
        `noise` says.
        """
        return ((self.mean - curve).square().sum(1) - self.noise).mean().item()


@torch.no_grad()
def average(
    problem: Problem, lr: float, batch_size: int, sampling: str, paths: int, steps: int, every: int, seed: int
) -> Average:
    """SGD from x0, x_{j+1} = x_j - lr grad f_B(x_j), at every so many steps, the start left out.

    Args:
        sampling: `WITH_REPLACEMENT` draws all samples independently, as in the paper's eq. (1); `SHUFFLED` goes through
            them in a new order in each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    gradients = vmap(grad(lambda x, batch: problem.mean(x, tuple(each[batch] for each in problem.samples))))
    batches = drawn if sampling == WITH_REPLACEMENT else shuffled
    x, kept = problem.x0.expand(paths, -1), []
    for step, batch in zip(range(1, steps + 1), batches(problem.size, batch_size, paths, generator), strict=False):
        x = x - lr * gradients(x, batch)
        if step % every == 0:
            kept.append(Average(x.mean(0), noise(x)))
    return Average(torch.stack([each.mean for each in kept]), torch.stack([each.noise for each in kept]))


def noise(x: Tensor) -> Tensor:
    """The trace of the covariance of the mean of x (paths, d). A single path is one without noise."""
    return x.var(0).sum() / len(x) if len(x) > 1 else x.new_zeros(())


def drawn(samples: int, batch_size: int, paths: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices (paths, batch_size), all independent."""
    while True:
        yield torch.randint(samples, (paths, batch_size), generator=generator)


def shuffled(samples: int, batch_size: int, paths: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices (paths, batch_size): each path goes through all samples once in every epoch."""
    while True:
        order = torch.rand(paths, samples, generator=generator, dtype=torch.float32).argsort(1)
        yield from order.split(batch_size, 1)
