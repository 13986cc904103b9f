"""D of batches beside that of the data set at one point of a training, and what steps with either of them gain."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..data import Samples
from ..steps.loss import Loss
from ..steps.moments import Moments, of_batch, of_data_set

POINTS = (0, 60, 200)  # steps of a training after which batches are compared with the data set
SIZES = (16, 64, 256, 1024)  # of batches; the last size is that of the data set
DRAWS = 8  # batches of each size
# Whose D corrects the gradient of a batch: that of the batch itself, which depends on the same samples, that of another
# batch of the same size, drawn independently, or that of the data set.
OWNERS = ("batch", "other", "data")
SGD = "SGD"


def sizes(samples: int) -> list[int]:
    """Those of the batches that are drawn from so many samples, and at last all of them."""
    return [*(size for size in SIZES if size < samples), samples]


def compare(model: nn.Module, samples: Samples, generator: torch.Generator) -> dict[str, list[float]]:
    """Batches B, with gradients g_B and matrices D_B, and the data set, with the gradient mu and the matrix D.

    Batches are drawn without replacement, and the smaller ones are parts of the larger ones.

    Returns:
        The entries of `geometry` and `steps`, as lists for all `sizes`.
    """
    whole, loss = of_data_set(model, samples), Loss(model, samples)
    orders = [torch.randperm(len(samples), generator=generator) for _ in range(DRAWS)]
    found = []
    for size in sizes(len(samples)):
        drawn = [samples[order[:size]] for order in orders]
        batches = [whole] if size == len(samples) else [of_batch(model, batch) for batch in drawn]
        corrections = corrections_of(batches, whole)
        found.append(geometry(batches, whole, corrections) | steps(batches, whole, corrections, loss))
    return {name: [each[name] for each in found] for name in found[0]}


def gradients_of(batches: Sequence[Moments]) -> Tensor:
    """(draws, d)."""
    return torch.stack([batch.gradient for batch in batches])


def corrections_of(batches: Sequence[Moments], whole: Moments) -> dict[str, Tensor]:
    """eps D g_B for all batches, (draws, d), by whose D it is, each with its own epsilon."""
    others = [*batches[1:], batches[0]]
    return {
        "batch": torch.stack([batch.correction(batch.gradient) for batch in batches]),
        "other": torch.stack([other.correction(batch.gradient) for batch, other in zip(batches, others, strict=True)]),
        "data": torch.stack([whole.correction(batch.gradient) for batch in batches]),
    }


def geometry(batches: Sequence[Moments], whole: Moments, corrections: dict[str, Tensor]) -> dict[str, float]:
    """Means over the batches.

    Returns:
        eigenvalue, trace: lambda_max(D_B) / lambda_max(D) and tr D_B / tr D.
        effective_rank: tr D_B / lambda_max(D_B).
        cosine gradient: that of g_B and mu.
        cosine mean: that of D_B mu and D mu.
        cosine OWNER: that of D' g_B and D mu, where D' is the owner's.
        length OWNER: |eps D' g_B| / |g_B|, which is at most `FRACTION`.
    """
    gradients, mean = gradients_of(batches), whole.gradient
    of_mean, wanted = torch.stack([batch.correction(mean) for batch in batches]), whole.correction(mean)
    lengths = {owner: each.norm(dim=1) / gradients.norm(dim=1) for owner, each in corrections.items()}
    return {
        "eigenvalue": fmean(batch.largest_eigenvalue for batch in batches) / whole.largest_eigenvalue,
        "trace": fmean(batch.trace for batch in batches) / whole.trace,
        "effective_rank": fmean(batch.trace / batch.largest_eigenvalue for batch in batches),
        "cosine gradient": cosine_similarity(gradients, mean).mean().item(),
        "cosine mean": cosine_similarity(of_mean, wanted).mean().item(),
        **{f"cosine {owner}": cosine_similarity(each, wanted).mean().item() for owner, each in corrections.items()},
        **{f"length {owner}": each.mean().item() for owner, each in lengths.items()},
    }


def steps(batches: Sequence[Moments], whole: Moments, corrections: dict[str, Tensor], loss: Loss) -> dict[str, float]:
    """Steps along g_B (SGD) and along (I - eps D') g_B, where D' is the owner's.

    Returns:
        rate NAME: the learning rate with the smallest mean over the batches of the loss after a step.
        decrease NAME: by how much that mean is less than the loss before.
    """
    gradients = gradients_of(batches)
    directions = {SGD: gradients} | {owner: gradients - each for owner, each in corrections.items()}
    found = {name: loss.best_step(each, 1 / whole.largest_eigenvalue) for name, each in directions.items()}
    rates = {f"rate {name}": rate for name, (rate, _) in found.items()}
    return rates | {f"decrease {name}": decrease for name, (_, decrease) in found.items()}
