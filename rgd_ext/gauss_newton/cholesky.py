"""Cholesky factorisation of a matrix that may be singular to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

_ULP = torch.finfo(torch.float64).eps
# The largest error of a solution, relative to the right-hand side, with which it counts as one.
_TOLERANCE = 1e-6


class Singular(RuntimeError):  # noqa: N818
    """The system has no solution that float64 can hold."""


class Factorised:
    """A symmetric positive definite matrix, factorised.

    Args:
        matrix: (n, n), in float64.
        waits: whether the host may wait for the device, to look at the outcome. If not, the jitter is added at once,
            and solutions of a singular system are NaN.

    Attributes:
        jitter: what was added to the diagonal.

    Raises:
        ValueError: if it is not finite, and the host waits.
        Singular: if the matrix is not positive definite, by more than rounding, and the host waits.
    """

    def __init__(self, matrix: Tensor, waits: bool) -> None:
        self._matrix, self._waits = matrix, waits
        self.jitter: float | Tensor = 0.0
        rounding = len(matrix) * _ULP * matrix.diagonal().amax()
        if not waits:
            self.jitter = rounding
            self._factor, failed = torch.linalg.cholesky_ex(self._jittered())
            self._factor = torch.where(failed == 0, self._factor, torch.nan)
            return
        if not rounding.isfinite():
            raise ValueError(
                "the derivative of a residual with respect to parameters is infinite or undefined, as that of a square"
                " root at zero: add a small number under the root, or leave the sample out"
            )
        for jitter in (0.0, rounding.item(), 100 * rounding.item()):
            self.jitter = jitter
            self._factor, failed = torch.linalg.cholesky_ex(self._jittered())
            if not failed:
                return
        raise self._singular()

    def _jittered(self) -> Tensor:
        if isinstance(self.jitter, float) and not self.jitter:
            return self._matrix
        matrix = self._matrix.clone()
        matrix.diagonal().add_(self.jitter)
        return matrix

    def solve(self, vector: Tensor) -> Tensor:
        """x in A x = v, for v (n,); Singular if jitter was needed and x does not solve the equations."""
        x = torch.cholesky_solve(vector[:, None], self._factor)[:, 0]
        if self._waits and self.jitter:
            error = (self._matrix @ x - vector).norm()
            if not error <= _TOLERANCE * vector.norm():
                raise self._singular()
        return x

    def _singular(self) -> Singular:
        scale = self._matrix.diagonal().amax().item()
        return Singular(
            f"the linear system of {len(self._matrix)} equations is singular in float64, with a diagonal of at most"
            f" {scale:.1e}: residuals, or weights, depend on each other, as those of a sample that comes twice. Pass a"
            f" damping of at least {_ULP**0.5 * scale:.0e}"
        )
