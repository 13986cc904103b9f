"""Products of D with vectors, its quadratic form, its trace and its dense form, as sums over per-sample gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor

from ..gradients import PerSampleGradients
from ..linalg import trace_rounding
from ..metric import rounding
from .checkpoint import fingerprint
from .moments import PooledMoments, pooled_moments
from .sources import Source, State
from .vectors import flat

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

# The largest dense D, in bytes.
_DENSE_BYTES = 2**31


class DiffusionOperator:
    """D = 1/(N - correction) sum_i (g_i - g)(g_i - g)^T for the gradients of a source, as a symmetric linear map.

    Vectors are rows of a float64 tensor (k, d), see `ParameterSpace`. Each product takes one pass over the source; so
    do the moments, once.

    Attributes:
        known_samples: N, or None before the first pass over a data set.

    Raises:
        ValueError: if the correction is not less than the number of samples; by the first pass where only that counts
            the samples.
    """

    def __init__(self, source: Source, correction: float) -> None:
        self.source, self.space, self.correction = source, source.space, correction
        self.known_samples = source.num_samples
        if self.known_samples is not None:
            self._check_correction(self.known_samples)

    def _check_correction(self, number: int) -> None:
        if number <= self.correction:
            raise ValueError(
                f"D of N = {number} samples with correction={self.correction} divides by {number - self.correction}:"
                " pass a smaller correction, or more samples"
            )

    @cached_property
    def moments(self) -> PooledMoments:
        """N, g, the sum of |g_i - g|^2 and the largest |g_i|^2."""
        moments = pooled_moments(self.source)
        self._check_correction(moments.samples)
        self.known_samples = moments.samples
        return moments

    @property
    def num_samples(self) -> int:
        """N; it takes the first pass over a data set."""
        return self.moments.samples if self.known_samples is None else self.known_samples

    @property
    def denominator(self) -> float:
        """N - correction."""
        return self.num_samples - self.correction

    @property
    def ulp(self) -> float:
        """How much of D rounding leaves where all gradients agree, relative to the largest |g_i|^2."""
        return rounding(self.space.accumulate_dtype, self.space.device)

    @cached_property
    def is_zero(self) -> bool:
        """Whether all gradients agree to rounding."""
        moments = self.moments
        return bool(moments.scatter <= trace_rounding(moments.largest, self.ulp) * moments.samples)

    def trace(self) -> Tensor:
        """tr D = 1/(N - correction) sum_i |g_i - g|^2."""
        scatter = self.moments.scatter
        return torch.zeros_like(scatter) if self.is_zero else scatter / self.denominator

    def products(self, rows: Tensor) -> Tensor:
        """D v for each row v, (k, d)."""
        if self.is_zero:
            return torch.zeros_like(rows)
        mean = self.moments.mean

        def step(state: State, grads: PerSampleGradients) -> None:
            for index, row in enumerate(rows):
                state["weights"][index] += self._accumulate(state["sum"][index], grads, row, mean)

        state = {"sum": torch.zeros_like(rows), "weights": rows.new_zeros(len(rows))}
        state = self.source.fold(f"product-{fingerprint(rows)}", state, step)
        # In exact arithmetic the weights sum to zero. What rounding leaves of the sum must not add a multiple of g.
        return (state["sum"] - state["weights"][:, None] * mean) / self.denominator

    def quadratic_forms(self, rows: Tensor) -> Tensor:
        """v^T D v for each row v, (k,)."""
        total, mean = rows.new_zeros(len(rows)), self.moments.mean
        if self.is_zero:
            return total

        def step(state: State, grads: PerSampleGradients) -> None:
            for index, row in enumerate(rows):
                state["sum"][index] += self._centred_products(grads, row, mean).square().sum()

        return self.source.fold(f"form-{fingerprint(rows)}", {"sum": total}, step)["sum"] / self.denominator

    def dense(self) -> Tensor:
        """D as a tensor (d, d), exactly symmetric.

        Raises:
            ValueError: if it would take more than 2 GiB.
        """
        dim = self.space.dimension
        size = 8 * dim**2
        if size > _DENSE_BYTES:
            raise ValueError(
                f"a dense D of d = {dim} takes {size} bytes ({size / 2**30:.1f} GiB): use D @ v, spectrum(k) or"
                " linear_operator(), which never form it"
            )
        mean = self.moments.mean
        total = self.space.zeros(dim, dim)
        if self.is_zero:
            return total

        def step(state: State, grads: PerSampleGradients) -> None:
            centred = self.space.gradient_rows(grads) - mean
            state["sum"].addmm_(centred.T, centred)

        total = self.source.fold("dense", {"sum": total}, step)["sum"]
        # Not every BLAS gives the two halves of a symmetric product the same bits.
        return (total + total.T) / (2 * self.denominator)

    @overload
    def apply(self, vectors: Tensor) -> Tensor: ...

    @overload
    def apply(self, vectors: Sequence[Tensor]) -> list[Tensor]: ...

    def apply(self, vectors: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """D v for vectors in any of their forms, in that form.

        Raises:
            ValueError, TypeError: as `ParameterSpace.rows`.
        """
        return self.space.in_form_of(vectors, self.products(self.space.rows(vectors)))

    def linear_operator(self) -> LinearOperator:
        """D as a symmetric `scipy.sparse.linalg.LinearOperator` on float64 arrays."""
        from scipy.sparse.linalg import LinearOperator

        def product(array: np.ndarray) -> np.ndarray:
            return self.apply(torch.from_numpy(array.astype("float64"))).numpy()

        products = {"matvec": product, "rmatvec": product, "matmat": product, "rmatmat": product}
        return LinearOperator((self.space.dimension, self.space.dimension), dtype="float64", **products)

    def seconds(self) -> float:
        """The time that a product with one vector takes, from a measurement of one batch.

        Raises:
            TypeError: if the source does not know the number of its batches.
        """
        row, mean = self.space.zeros(self.space.dimension).fill_(1), self.space.zeros(self.space.dimension)

        def step(state: State, grads: PerSampleGradients) -> None:
            self._accumulate(state["sum"], grads, row, mean)

        return self.source.seconds({"sum": torch.zeros_like(row)}, step)

    def _accumulate(self, total: Tensor, grads: PerSampleGradients, row: Tensor, mean: Tensor) -> Tensor:
        """Add sum_i w_i g_i with the weights w_i = <g_i - g, v> to `total`, and return the sum of the weights."""
        weights = self._centred_products(grads, row, mean)
        total += flat(grads.combine(weights.to(self.space.accumulate_dtype)))
        return weights.sum()

    def _centred_products(self, grads: PerSampleGradients, row: Tensor, mean: Tensor) -> Tensor:
        """<g_i - g, v>, (B,)."""
        parts = [part.to(like) for part, like in zip(self.space.split(row), self.space.like, strict=True)]
        return grads.align(parts).double() - mean @ row
