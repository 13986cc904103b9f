"""The largest eigenvalue of a Gramian."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import eigenvalues
from .checks import check_gramian
from .library import LIBRARY, register_default, register_fake

LIBRARY.define("largest_eigenvalue(Tensor matrix, float ulp) -> Tensor")


@register_fake("largest_eigenvalue")
def _(matrix: Tensor, ulp: float) -> Tensor:
    return matrix.new_empty(())


@register_default("largest_eigenvalue")
def default_largest_eigenvalue(matrix: Tensor, ulp: float) -> Tensor:
    """lambda_max of a symmetric positive semi-definite matrix, to full precision whatever `ulp` is."""
    return eigenvalues(matrix)[-1].clone()


def largest_eigenvalue(matrix: Tensor, ulp: float | None = None) -> Tensor:
    """lambda_max of a symmetric positive semi-definite matrix, such as a Gramian, as precisely as its entries allow.

    Args:
        matrix: shape (B, B), float64 or float32.
        ulp: relative rounding error of its entries, by default that of its dtype; larger for a float64 matrix made from
            float32. On a GPU sums are in float32 if `ulp` is at least that of float32.

    Returns:
        A scalar of the dtype of `matrix`, at least 0; NaN where `matrix` is not finite. The search stops at a residual
        |A v - theta v| of ulp / 4 (1e-13 at least) times theta. That bounds the distance to an eigenvalue; if one lies
        just above a cluster of others, theta may be one of these, and errors of 100 ulps were seen.

    Raises:
        ValueError: if `matrix` is empty or not square, or for an ulp that is negative or not below 1.
        TypeError: for another dtype.
    """
    check_gramian("matrix", matrix)
    ulp = torch.finfo(matrix.dtype).eps if ulp is None else ulp
    if not 0 <= ulp < 1:
        raise ValueError(f"ulp is {ulp}: pass a relative rounding error, at least 0 and below 1, or None")
    return torch.ops.rgd_ext.largest_eigenvalue(matrix, ulp)
