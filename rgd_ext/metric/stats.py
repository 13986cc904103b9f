"""The statistics of one batch: those from which a policy chooses epsilon, and those of the direction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .. import linalg
from ..gradients import PerSampleGradients


@dataclass(eq=False, repr=False)
class Statistics:
    """The statistics of a batch before epsilon is chosen: what a policy is called with.

    With g_i the per-sample gradients, g their mean and D their covariance. All are those of the loss whose backward was
    called: if that was multiplied by S, as by a `torch.amp.GradScaler`, so is g, and D by S^2; the epsilon of a policy
    that is invariant to the scale of the loss is then multiplied by 1 / S^2. Tensors stay on the device, and reading a
    number synchronises.

    Attributes:
        batch_size: B.
        squared_grad_norm: |g|^2.
        alignments: a_i = <g_i - g, g>, shape (B,).
        squared_norms: |g_i - g|^2, shape (B,).
        centred_gram: the Gramian of g_i - g, shape (B, B), or None where the policy does not need it and the layers do
            not compute it anyway.
        ulp: the part of D that may be rounding error where all gradients agree, relative to the largest |g_i|^2; see
            `rounding`.
        eigenvalue_share: lambda_max(D) / tr D of an earlier batch, from which `largest_eigenvalue` is to be estimated;
            None where it is to be computed.
    """

    batch_size: int
    squared_grad_norm: Tensor
    alignments: Tensor
    squared_norms: Tensor
    centred_gram: Tensor | None
    ulp: float
    eigenvalue_share: Tensor | None = None

    _shown: ClassVar[tuple[str, ...]] = ("grad_norm", "rayleigh", "trace", "largest_eigenvalue", "rank")

    @property
    def grad_norm(self) -> Tensor:
        """|g|."""
        return self.squared_grad_norm.sqrt()

    @cached_property
    def trace(self) -> Tensor:
        """tr D = mean_i |g_i - g|^2."""
        return self.squared_norms.mean()

    @property
    def rayleigh(self) -> Tensor:
        """The Rayleigh quotient g^T D g / |g|^2 = mean_i a_i^2 / |g|^2; 0 where g = 0."""
        squared = self.squared_grad_norm
        return torch.where(squared == 0, squared, self.alignments.square().mean() / squared)

    @cached_property
    def eigenvalues(self) -> Tensor | None:
        """The B largest eigenvalues of D, ascending (at most B - 1 are not zero), or None without the Gramian."""
        if self.centred_gram is None:
            return None
        return linalg.eigenvalues(self.centred_gram) / self.batch_size

    @cached_property
    def largest_eigenvalue(self) -> Tensor | None:
        """lambda_max(D); between the batches in which `Spectral(every=...)` computes it, its estimate.

        None without the Gramian and an estimate.
        """
        if self.eigenvalue_share is not None:
            return self.eigenvalue_share.to(self.trace) * self.trace
        if self.centred_gram is None:
            return None
        return torch.ops.rgd_ext.largest_eigenvalue(self.centred_gram, self.ulp) / float(self.batch_size)

    @property
    def rank(self) -> Tensor | None:
        """The number of eigenvalues of D above the rounding of its entries, at most B - 1; None without the Gramian."""
        if self.eigenvalues is None:
            return None
        largest = (self.squared_grad_norm + 2 * self.alignments + self.squared_norms).max()  # |g_i|^2
        return linalg.rank(self.eigenvalues, self.batch_size, largest, self.ulp).clamp(max=self.batch_size - 1)

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in self._shown}
        shown = [f"{name}={value.item():.4g}" for name, value in values.items() if value is not None]
        return f"{type(self).__name__}({', '.join([f'batch_size={self.batch_size}', *shown])})"


class Stats(Statistics):
    """What the diffusion metric knows of a batch and of the direction it gave: `Statistics`, epsilon and the weights.

    Args:
        statistics: of the batch; what the policy has read of them is not computed again.
        epsilon: what the policy chose; 0 where D = 0 to rounding.
        weights: w_i, shape (B,), of which the direction is sum_i w_i g_i.
        squared_direction_norm: |sum_i w_i g_i|^2; it may be None if the Gramian is there.

    Attributes:
        epsilon, weights: the arguments.
    """

    _shown = (
        *("epsilon", "grad_norm", "direction_norm", "cosine", "rayleigh", "trace", "largest_eigenvalue", "rank"),
        *("effective_sample_size", "negative_weights"),
    )

    def __init__(
        self, statistics: Statistics, epsilon: Tensor, weights: Tensor, squared_direction_norm: Tensor | None = None
    ) -> None:
        # With the cached properties, too.
        vars(self).update(vars(statistics))
        self.epsilon, self.weights, self._squared_direction_norm = epsilon, weights, squared_direction_norm

    @cached_property
    def direction_norm(self) -> Tensor:
        """The norm of the direction, |g + sum_i w_i (g_i - g)|."""
        if self._squared_direction_norm is not None:
            return self._squared_direction_norm.sqrt().to(self.weights)
        cross = 2 * self.weights @ self.alignments
        squared = self.squared_grad_norm + cross + self.weights @ self.centred_gram @ self.weights  # type: ignore[operator]  # see the class
        return squared.clamp(min=0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """The cosine of the angle between the direction and g; 1 where one of them is zero."""
        product = self.squared_grad_norm + (self.weights * self.alignments).sum()
        norms = self.grad_norm * self.direction_norm
        return torch.where(norms == 0, torch.ones_like(norms), product / norms)

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum_i w_i)^2 / sum_i w_i^2, which is B for equal weights."""
        return self.weights.sum().square() / self.weights.square().sum()

    @property
    def negative_weights(self) -> Tensor:
        """The number of negative weights."""
        return (self.weights < 0).sum()


def statistics(grads: PerSampleGradients, with_gram: bool, eigenvalue_share: Tensor | None = None) -> Statistics:
    """The statistics of a batch, from K = G G^T if `with_gram`, or if the source has no moments without it."""
    moments = None if with_gram else grads.moments()
    if moments is not None:
        ulp = rounding(moments.alignments.dtype, moments.alignments.device)
        return Statistics(grads.batch_size, *moments, None, ulp, eigenvalue_share)
    gram = grads.gram()
    ulp = rounding(gram.dtype, gram.device)
    squared_grad_norm, alignments, squared_norms, centred = torch.ops.rgd_ext.gram_moments(gram)
    return Statistics(grads.batch_size, squared_grad_norm, alignments, squared_norms, centred, ulp, eigenvalue_share)


@cache
def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The part of D that may be rounding error where all gradients agree, relative to |g|^2, in statistics of `dtype`.

    On a GPU, float32 statistics may come from matrix units, which truncate when they add, and, if torch allows TF32,
    from gradients rounded to 11 bits. An entry of K may then have a relative error of 2^-10. But K is still the Gramian
    of gradients with relative errors of 2^-11, so where D is zero its value is at most the square of that.
    """
    from_matrix_units = device.type == "cuda" and dtype == torch.float32
    return 2.0**-21 if from_matrix_units else torch.finfo(dtype).eps
