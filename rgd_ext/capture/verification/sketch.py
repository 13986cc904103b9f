"""Comparison of gradients by random projections, which take a fraction of their memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..precision import full_precision

# The number of projections of each row. A difference is missed if it is nearly orthogonal to all of them.
_NUMBER = 4


class Difference(NamedTuple):
    """Where two gradients differ most.

    Attributes:
        error: the norm of the difference over that of the parameter's gradient, or of a small share of the whole.
        index: the place of the parameter among all that are compared.
    """

    error: float
    index: int


def sketch(x: Tensor | None, like: Tensor) -> Tensor:
    """Random projections (R^T x_r) of the rows x_r of a tensor, scaled so that squared norms agree in expectation.

    R is the same in every call for one shape. A tensor that has few elements per row is its own sketch.

    Args:
        x: a gradient, or None for zeros.
        like: a tensor of its shape, dtype and device, such as the parameter.

    Returns:
        Shape (r * min(c, 4),), for the view (r, c) of `like` that is closest to a square.
    """
    count, size = _rows(like.shape)
    dtype = torch.promote_types(like.dtype, torch.float)
    if x is None:
        return torch.zeros(count * min(size, _NUMBER), dtype=dtype, device=like.device)
    rows = (x.to_dense() if x.is_sparse else x).detach().reshape(count, size).to(dtype)
    with full_precision(rows.device):
        return (rows if size <= _NUMBER else rows @ _directions(size, dtype).to(rows.device)).flatten()


def _rows(shape: torch.Size) -> tuple[int, int]:
    """The view as a matrix with the fewest rows and columns together."""
    views = [(shape[:dim].numel(), shape[dim:].numel()) for dim in range(1, len(shape) + 1)]
    return min(views, key=sum, default=(1, 1))


@lru_cache(maxsize=32)
def _directions(size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, _NUMBER, generator=generator, dtype=dtype, device="cpu") / _NUMBER**0.5


def norm(sketches: Sequence[Tensor]) -> float:
    """The norm of a whole gradient, given the sketches of its parts."""
    return sum(each.double().square().sum().item() for each in sketches) ** 0.5


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor], share: float) -> Difference:
    """The parameter whose gradient differs most from what is expected, relative to its norm.

    Gradients that cancel hold nothing but rounding, so norms count as at least `share` of that of the whole.
    """
    least = share * max(norm(expected), norm(found))
    errors = []
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(norm([ours]), norm([theirs]), least)
        error = norm([ours - theirs])
        errors.append(math.inf if not math.isfinite(error) else error / scale if scale else 0.0)
    error = max(errors)
    return Difference(error, errors.index(error))


def fitted(columns: Sequence[Sequence[Tensor]], target: Sequence[Tensor]) -> list[Tensor]:
    """The linear combination of gradients `columns` that is closest to `target`, split by parameters as they are."""
    matrix = torch.stack([torch.cat([part.double().flatten() for part in column]) for column in columns], 1)
    vector = torch.cat([part.double().flatten() for part in target])
    coefficients = torch.linalg.pinv(matrix) @ vector
    return list((matrix @ coefficients).split([part.numel() for part in target]))
