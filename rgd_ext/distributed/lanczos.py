"""The largest eigenvalue of a covariance whose samples are in several processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Steps after convergence. Each multiplies the part of an eigenvector with a larger eigenvalue.
_CONFIRMATIONS = 2


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, noise: float = 0.0
) -> Tensor:
    """lambda_max(D) of the covariance D = C^T C / B, by Lanczos iteration on C C^T / B.

    The vectors of the iteration have one number for each sample. They are kept, and each new one is made orthogonal to
    all of them. The iteration ends at a residual of a quarter of sqrt(ulp) theta, where theta differs from an
    eigenvalue by about ulp theta, since its error is of the order of the square of the residual; and not before that
    has held for some steps, in which a larger eigenvalue would come up whose vector the start has hardly any part of.

    Args:
        product: C C^T u for a centred u, (B,), in float64.
        size: B.
        dtype: the dtype of the products, which has the ulp.
        noise: the rounding error of C C^T u / B for |u| = 1, below which no residual falls.

    Returns:
        A scalar of `dtype` on the host; 0 for one sample, NaN if a product is not finite.
    """
    tolerance = torch.finfo(dtype).eps ** 0.5 / 4
    # The same numbers in all processes, and parallel to no vector that the gradients prefer.
    start = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vector = start - start.mean()
    basis = vector.new_zeros(0, size)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    theta, settled, converged = vector.new_zeros(()), 0.0, 0
    while len(basis) < size - 1:
        basis = torch.cat([basis, (vector / vector.norm())[None]])
        image = product(basis[-1]).double().cpu() / size
        if not image.isfinite().all():
            return theta.new_full((), torch.nan).to(dtype)
        diagonal.append(basis[-1] @ image)
        for _ in range(2):  # once leaves rounding errors
            image = image - basis.T @ (basis @ image)
        vector = image - image.mean()
        theta, residual = _ritz(diagonal, beside, vector.norm())
        is_small = residual <= max(tolerance * theta.item(), noise)
        is_settled = theta <= max(settled * (1 + tolerance), settled + noise)
        converged, settled = (converged + 1 if is_small and is_settled else 0), theta.item()
        if converged > _CONFIRMATIONS or not vector.norm():
            break
        beside.append(vector.norm())
    return theta.clamp(min=0).to(dtype)


def _ritz(diagonal: list[Tensor], beside: list[Tensor], rest: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of the tridiagonal matrix, and the norm of the residual of its vector."""
    matrix = torch.diag(torch.stack(diagonal))
    if beside:
        matrix = matrix + torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values[-1], rest * vectors[-1, -1].abs()
