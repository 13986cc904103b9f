"""Where the per-sample gradients of a diffusion matrix come from: they are held, or computed anew in every pass."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..gradients import DenseGradients, PerSampleGradients, adapted
from ..linalg import accumulate_dtype
from ..metric import statistics
from .vectors import ParameterSpace

# What a pass accumulates, and the function that adds a batch to it in place.
State = dict[str, Tensor]
Step = Callable[[State, PerSampleGradients], None]


class Source(ABC):
    """N per-sample gradients that are read in passes, a batch at a time.

    Attributes:
        space: the parameter space of the gradients.
        num_samples: N, or None where it takes a pass to count the samples.
        gramian_matrices: how many matrices of `gramian_elements` are in memory at once while `centred_gramian` and its
            eigenvalues are computed.
    """

    space: ParameterSpace
    num_samples: int | None = None
    gramian_matrices = 3

    @abstractmethod
    def num_batches(self) -> int | None:
        """The number of batches in a pass, or None where it takes a pass to count them."""

    @abstractmethod
    def fold(self, name: str, state: State, step: Step) -> State:
        """`state` after a step for each batch of a pass; `name` tells the results of a checkpoint apart."""

    @abstractmethod
    def seconds(self, state: State, step: Step) -> float:
        """The time that a pass takes, from a measurement of one batch."""

    @abstractmethod
    def centred_gramian(self, mean: Tensor, samples: int) -> Tensor:
        """The products <g_i - g, g_j - g>, (N, N), given g and N."""

    @abstractmethod
    def gramian_elements(self, samples: int) -> int:
        """The size of the largest matrix that `centred_gramian` forms for N samples."""


class HeldGradients(Source):
    """Per-sample gradients that are in memory, as one batch."""

    # The CPU kernel sums up to eight Gramians of a batch.
    gramian_matrices = 3 + 8

    @torch.no_grad()
    def __init__(self, grads: PerSampleGradients) -> None:
        self.grads = grads
        self.num_samples = grads.batch_size
        self.space = ParameterSpace(grads.mean())

    def num_batches(self) -> int:
        """One."""
        return 1

    @torch.no_grad()
    def fold(self, name: str, state: State, step: Step) -> State:
        """`state` after one step."""
        step(state, self.grads)
        return state

    @torch.no_grad()
    def seconds(self, state: State, step: Step) -> float:
        """The time that a pass takes, measured."""
        return timed(lambda: step(state, self.grads))

    @torch.no_grad()
    def centred_gramian(self, mean: Tensor, samples: int) -> Tensor:
        """The products <g_i - g, g_j - g>, (N, N), from the Gramian that the gradients give."""
        return statistics(self.grads, with_gram=True).centred_gram  # type: ignore[return-value]  # it was asked for

    def gramian_elements(self, samples: int) -> int:
        """N^2, since the Gramian is computed without forming G."""
        return samples**2


def source_of(grads: ops.Tensors | PerSampleGradients | Source) -> Source:
    """The source that `grads` is or makes.

    Raises:
        ValueError, TypeError: as `rgd_ext.ops.moments`.
    """
    if isinstance(grads, Source):
        return grads
    return HeldGradients(
        adapted(grads) if isinstance(grads, PerSampleGradients) else DenseGradients(_deviations(grads))
    )


@torch.no_grad()
def _deviations(grads: ops.Tensors) -> list[Tensor]:
    """g_i - g in the accumulation dtype: they have the same D, and their small differences keep their digits."""
    grads = [g.to(accumulate_dtype(g.dtype)) for g in ops.checked_grads(grads)]
    return [g - g.mean(0) for g in grads]


def timed(run: Callable[[], None]) -> float:
    """The seconds that `run` takes the second time, on whatever device."""
    run()  # the first call allocates
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
