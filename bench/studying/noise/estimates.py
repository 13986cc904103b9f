"""How far estimates of the noise scale from batches are from the truth, for estimators that see the same samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH_SIZES = (16, 64, 256)
# By name, into how many equal parts a batch is divided, and of how many of them the gradient is known. Parts of one
# sample, here 0, make the estimator from per-sample gradients.
PER_SAMPLE = "per sample"
ESTIMATORS = {
    PER_SAMPLE: (0, 0),
    "all 8 parts": (8, 8),
    "all 4 parts": (4, 4),
    "both halves": (2, 2),
    "one part of 8": (8, 1),
    "one half": (2, 1),
}
AVERAGED = (1, 3, 10, 30, 100)  # batches whose estimates are summed up
LEVEL = 0.68  # of errors, as many as a standard deviation has if they are normal
CHUNK = 10  # batches, whose Gramians are in the cache


def estimates(blocks: Tensor, parts: int, known: int) -> Tensor:
    """Unbiased estimates of tr Sigma and |mu|^2 by the two-batch estimator, (2, T).

    The big batch has B samples, and its parts, the small ones, have b. E |G_B|^2 = |mu|^2 + tr Sigma / B and the same
    for b are two equations for the two (S. McCandlish et al., 2018, arXiv 1812.06162, appendix A.1).

    Args:
        blocks: the Gramians of T batches, (T, B, B).
        parts: their number, B / b.
        known: of how many parts |G_b|^2 is averaged.
    """
    size = blocks.shape[1]
    small = size // parts
    gram = blocks.view(-1, parts, small, parts, small).mean((2, 4))  # of the gradients of the parts
    of_parts, of_batch = gram.diagonal(dim1=1, dim2=2)[:, :known].mean(1), gram.mean((1, 2))
    trace = (of_parts - of_batch) / (1 / small - 1 / size)
    return torch.stack([trace, (size * of_batch - small * of_parts) / (size - small)])


def errors(gram: Tensor, batch_size: int, draws: int, generator: torch.Generator) -> dict[str, dict[str, Any]]:
    """What `error` gives for each of `ESTIMATORS`, for as many batches, drawn from N samples with replacement.

    Args:
        gram: the Gramian of all samples, (N, N).
    """
    truth = torch.stack([gram.diagonal().mean() - gram.mean(), gram.mean()])
    found: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
    for index in torch.randint(len(gram), (draws, batch_size), generator=generator).split(CHUNK):
        blocks = gram[index[:, :, None], index[:, None, :]]
        for name, (parts, known) in ESTIMATORS.items():
            found[name].append(estimates(blocks, parts or batch_size, known or batch_size))
    return {name: error(torch.cat(parts, 1) / truth[:, None]) for name, parts in found.items()}


def error(relative: Tensor) -> dict[str, Any]:
    """Errors of independent estimates, (2, T), of tr Sigma and |mu|^2 in units of the truth.

    Returns:
        trace, squared_norm: root mean squares.
        noise_scale: the standard deviation of the difference of the two, which is that of their ratio in linear order.
            Over K batches, as soon as it is small, the noise scale has this error over K^(1/2).
        quantiles: of the absolute error of the noise scale, at `LEVEL`, for sums over K batches with K of `AVERAGED`.
            The ratio of single batches has no variance.
    """
    root_mean_squares = (relative - 1).square().mean(1).sqrt()
    return {
        "trace": root_mean_squares[0].item(),
        "squared_norm": root_mean_squares[1].item(),
        "noise_scale": (relative[0] - relative[1]).std().item(),
        "quantiles": [_quantile(relative, batches) for batches in AVERAGED if batches <= relative.shape[1]],
    }


def _quantile(relative: Tensor, batches: int) -> float:
    groups = relative.shape[1] // batches
    trace, squared_norm = relative[:, : groups * batches].view(2, groups, batches).sum(2)
    return (trace / squared_norm - 1).abs().quantile(LEVEL).item()
