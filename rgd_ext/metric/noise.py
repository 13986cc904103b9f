"""The gradient noise scale over a sequence of batches."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

# After so many batches the weight of a batch in the running means has fallen to 1/e.
HORIZON = 100

# Numbers or tensors.
Number = TypeVar("Number", float, Tensor)


def unbiased(batch_size: float, squared_grad_norm: Number, trace: Number) -> tuple[Number, Number]:
    """Unbiased estimates of tr Sigma and |mu|^2 from B samples with |g|^2 and tr D; NaN for one sample.

    Sigma is the covariance of the gradients of single samples, and mu the gradient over all data.
    """
    found = trace * (batch_size / (batch_size - 1) if batch_size > 1 else math.nan)
    return found, squared_grad_norm - found / batch_size


class NoiseScale:
    """The gradient noise scale tr Sigma / |mu|^2 from running means of its numerator and of its denominator.

    Both estimates have no bias in each batch, see `Statistics.noise_scale`, but a single batch says little of |mu|^2,
    and a mean of ratios would be biased. So exponential running means of both are divided, as in S. McCandlish et al.,
    *An Empirical Model of Large-Batch Training*, 2018, appendix A. Batches may differ in size: the estimate of tr Sigma
    counts B - 1 times, its degrees of freedom, and that of |mu|^2 B (B - 1) times, since it is the mean of <g_i, g_j>
    over the pairs of samples. Otherwise a small last batch would add more noise than all others.
    """

    def __init__(self) -> None:
        # Sums with weights that decay, and those of the weights.
        self._trace = self._freedom = self._squared_norm = self._pairs = 0.0

    def add(self, batch_size: float, squared_grad_norm: float, trace: float) -> None:
        """Add a batch of B samples with |g|^2 and tr D; single samples, and what is not finite, are left out."""
        if batch_size < 2 or not math.isfinite(squared_grad_norm + trace):
            return
        decay, freedom = math.exp(-1 / HORIZON), batch_size - 1
        of_samples, squared_norm = unbiased(batch_size, squared_grad_norm, trace)
        self._trace = decay * self._trace + freedom * of_samples
        self._freedom = decay * self._freedom + freedom
        self._squared_norm = decay * self._squared_norm + batch_size * freedom * squared_norm
        self._pairs = decay * self._pairs + batch_size * freedom

    @property
    def value(self) -> float | None:
        """tr Sigma / |mu|^2, in samples; None as long as the estimate of |mu|^2 is not positive."""
        if self._squared_norm <= 0:
            return None
        return (self._trace / self._freedom) / (self._squared_norm / self._pairs)

    @property
    def signal_to_noise(self) -> float | None:
        """|mu|^2 over tr Sigma / B, the variance of a batch's gradient; None until both estimates are positive.

        The mean of tr Sigma / B is weighted like that of |mu|^2.
        """
        return self._squared_norm / self._trace if self._squared_norm > 0 and self._trace > 0 else None
