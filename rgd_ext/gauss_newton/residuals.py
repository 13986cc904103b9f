"""The residuals that a closure returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

# What a closure returns: residuals (B,) or (B, k), or several of them, each of a batch of its own.
Residuals: TypeAlias = Tensor | Sequence[Tensor]
Closure: TypeAlias = Callable[[], Residuals]


def batches_of(returned: object) -> list[Tensor]:
    """The residuals of each batch, (B,) or (B, k), given what a closure returned.

    Raises:
        TypeError: for what is no tensor, or not one of real numbers.
        ValueError: for a scalar, more than two dimensions, or no samples.
    """
    several = isinstance(returned, (tuple, list))
    batches = [*returned] if isinstance(returned, (tuple, list)) else [returned]
    if not batches:
        raise ValueError("the closure returned no residuals: return (B,) or (B, k), or a tuple of such tensors")
    return [
        _checked(each, f"element {n} of what the closure returned" if several else "what the closure returned")
        for n, each in enumerate(batches)
    ]


def _checked(residuals: object, what: str) -> Tensor:
    if not isinstance(residuals, Tensor):
        raise TypeError(f"{what} is of type {type(residuals).__name__}: return the residuals, a tensor (B,) or (B, k)")
    shape = tuple(residuals.shape)
    if not residuals.is_floating_point():
        remedy = "torch.view_as_real(r).flatten(1)" if residuals.is_complex() else "differences of real numbers"
        raise TypeError(f"{what} has dtype {residuals.dtype}: return {remedy}")
    if residuals.ndim == 0:
        raise ValueError(
            f"{what} is a scalar, as a loss is: return the residuals of the samples, such as model(x)[:, 0] - y,"
            " (B,) or (B, k); the step minimises half the sum of their squares"
        )
    if residuals.ndim > 2:
        raise ValueError(f"{what} has shape {shape}: return (B,) or (B, k), such as residuals.flatten(1)")
    if not residuals.numel():
        raise ValueError(f"{what} has shape {shape}, without a residual: leave such batches out")
    return residuals


def columns_of(batches: Sequence[Tensor]) -> list[Tensor]:
    """The residuals in the order of the rows of the Jacobian: one (B,) for each of the k of a batch."""
    return [column for batch in batches for column in (batch.unbind(1) if batch.ndim > 1 else [batch])]


def joined(batches: Sequence[Tensor]) -> Tensor:
    """All residuals, (N,), in float64: batch after batch, and in a batch one column after another."""
    return torch.cat([column.detach().double() for column in columns_of(batches)])
