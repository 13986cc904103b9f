"""D of a model and a data set, and the facts about it that are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from ...diffusion import DiffusionMatrix
from ..resolve import is_batch


class SpectrumSummary(NamedTuple):
    """The facts about D that are printed and drawn.

    Attributes:
        dimension: d, the number of trainable parameters.
        samples: N.
        trace: tr D.
        rank: the rank of D, or None where all eigenvalues are too many to compute.
        eigenvalues: the largest ones that are positive beyond rounding, descending.
    """

    dimension: int
    samples: int
    trace: float
    rank: int | None
    eigenvalues: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """The cumulative shares of the trace, the last one that of all these eigenvalues."""
        return self.eigenvalues.cumsum() / self.trace


def build(
    model: nn.Module, loss: Callable, data: Iterable, checkpoint: Path | None = None, progress: bool = False
) -> DiffusionMatrix:
    """D for a pair (x, y), which is one batch, or for a loader; with the model in evaluation mode.

    Raises:
        ValueError: for a checkpoint of a batch, and as `DiffusionMatrix` does.
    """
    model.eval()
    if not is_batch(data):
        return DiffusionMatrix.from_dataset(model, loss, data, checkpoint=checkpoint, progress=progress)
    if len(data) != 2:
        raise ValueError(f"data is a tuple of {len(data)}: return a pair (x, y), or a loader that gives pairs")
    if checkpoint is not None:
        raise ValueError("a checkpoint is for passes over a loader, and the data is one batch (x, y): leave it out")
    return DiffusionMatrix.from_batch(model, loss, *data)


def compute(matrix: DiffusionMatrix, k: int) -> SpectrumSummary:
    """The k largest eigenvalues of D, or all that are positive where those are fewer."""
    values = matrix.spectrum(k)
    try:
        rank = matrix.rank()
    except RuntimeError:  # not all eigenvalues can be computed
        rank = None
    found = values[:rank].cpu().numpy()
    return SpectrumSummary(matrix.shape[0], matrix.num_samples, matrix.trace().item(), rank, found[found > 0])
