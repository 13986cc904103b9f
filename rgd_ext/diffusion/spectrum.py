"""Eigenvalues of the diffusion matrix: all of them from a small dense matrix, or the largest by Lanczos iteration."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .. import linalg
from .products import DiffusionOperator

# The order of the largest matrix of which all eigenvalues are computed.
_EXACT = 4096


class Estimate(NamedTuple):
    """What the computation of a spectrum will take.

    Attributes:
        passes: how many passes over the samples. Where ARPACK iterates this is a rough guess: it may need twice as
            many, or more, if eigenvalues are close to each other.
        seconds: the time of these passes, from the time of one batch.
        bytes: the memory, besides the model and the per-sample gradients of one batch.
    """

    passes: int
    seconds: float
    bytes: int


class Spectrum:
    """The eigenvalues of an operator D.

    If D is small, or the Gramian of the centred gradients and all that it takes to form it, then all eigenvalues are
    computed from that matrix; small is a size of at most `_EXACT`^2 elements.
    Otherwise ARPACK iterates on products D v.

    Args:
        operator: D.
    """

    def __init__(self, operator: DiffusionOperator) -> None:
        self.operator = operator
        self.dimension = operator.space.dimension

    def largest(self, k: int | None) -> Tensor:
        """The k largest eigenvalues, (k,), descending; all min(N - 1, d) that can be positive for None.

        Raises:
            ValueError: if `k` is out of range, or if it is None or d where only ARPACK serves.
            scipy.sparse.linalg.ArpackNoConvergence: if it does not converge.
        """
        self._check_number(k)
        values = self._all
        if values is None:
            self._check_number(k)  # again, now that N is known
            values = self._iterate(min(k, self._rank_bound))  # type: ignore[type-var, arg-type]  # k is a number here
        if k is None:
            return values
        return torch.nn.functional.pad(values[:k], (0, max(0, k - len(values))))

    def rank(self) -> int:
        """The number of eigenvalues above the rounding of the entries of D.

        Raises:
            RuntimeError: if not all eigenvalues can be computed.
        """
        values = self._all
        if values is None:
            raise RuntimeError(
                f"rank needs all eigenvalues of D, too many to compute: the rank is at most min(N - 1, d) ="
                f" {self._rank_bound}; {self._remedy}"
            )
        if len(values) == 0:
            return 0
        operator = self.operator
        size = min(operator.num_samples, self.dimension)
        return int(linalg.rank(values, size, operator.moments.largest, operator.ulp))

    def estimate(self, k: int | None) -> Estimate:
        """What `largest(k)` will take. Before the first pass over a data set, N is taken to be large.

        Raises:
            ValueError: as `largest`.
            TypeError: if the source does not know the number of its batches.
        """
        self._check_number(k)
        samples = self.operator.known_samples
        if k in (None, self.dimension) or self._is_exact(samples):
            elements = min(self._elements(samples), _EXACT**2)
            passes, size = 2, self.operator.source.gramian_matrices * 8 * elements
        else:
            basis = _basis_size(k, self.dimension)
            passes, size = 1 + basis + (basis - k) // 2, 8 * self.dimension * (basis + 4)
        return Estimate(passes, passes * self.operator.seconds(), size)

    def _check_number(self, k: int | None) -> None:
        """Raise ValueError if there are no k eigenvalues, or too many for ARPACK."""
        if k is not None and (not isinstance(k, int) or not 1 <= k <= self.dimension):
            raise ValueError(
                f"k is {k!r}: pass a whole number from 1 to d = {self.dimension}, or None for all eigenvalues"
            )
        # Each batch has at least one sample.
        samples = self.operator.known_samples or self.operator.source.num_batches() or 1
        if k in (None, self.dimension) and not self._is_exact(samples):
            raise ValueError(f"all eigenvalues of D, of d = {self.dimension}, are too many to compute: {self._remedy}")

    @property
    def _remedy(self) -> str:
        """What to call where not all eigenvalues can be computed."""
        text = "spectrum(k) with a small k, as in spectrum(10), shows how many matter"
        is_held = self.operator.source.num_samples is not None
        return text if is_held else f"{text}, and from_batch takes up to {_EXACT} samples at once"

    @property
    def _rank_bound(self) -> int:
        return min(self.operator.num_samples - 1, self.dimension)

    def _elements(self, samples: int | None) -> int:
        """The size of the smallest matrix that gives all eigenvalues: D, or the one behind the Gramian."""
        if samples is None or self.dimension <= samples:
            return self.dimension**2
        return self.operator.source.gramian_elements(samples)

    def _is_exact(self, samples: int | None) -> bool:
        return self._elements(samples) <= _EXACT**2

    @cached_property
    def _all(self) -> Tensor | None:
        """The min(N - 1, d) largest, descending, or None where no matrix that gives them is small."""
        operator, bound = self.operator, self._rank_bound
        if operator.is_zero:
            return operator.space.zeros(bound)
        if not self._is_exact(operator.num_samples):
            return None
        if self.dimension <= operator.num_samples:
            values = linalg.eigenvalues(operator.dense())
        else:
            gramian = operator.source.centred_gramian(operator.moments.mean, operator.num_samples)
            values = linalg.eigenvalues(gramian) / operator.denominator
        return values.flip(0)[:bound]

    def _iterate(self, k: int) -> Tensor:
        from scipy.sparse.linalg import eigsh

        # The start is always the same, so that products in a checkpoint are found again.
        start = torch.randn(self.dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
        tolerance = max(1e-10, 100 * self.operator.ulp)
        options = {"ncv": _basis_size(k, self.dimension), "v0": start, "tol": tolerance, "return_eigenvectors": False}
        values = torch.from_numpy(eigsh(self.operator.linear_operator(), k, which="LA", **options))
        return values.sort(descending=True)[0].to(self.operator.space.device)


def _basis_size(k: int, dim: int) -> int:
    """How many Lanczos vectors ARPACK keeps for k eigenvalues."""
    return min(dim, max(2 * k + 1, 20))
