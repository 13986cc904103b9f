"""One parameter's contributions from several uses, and from several batches."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from .embedding import Rows, Tied
from .factors import Dense, Factor, Outer


def add(factors: list[Factor]) -> Factor:
    """The sum of one parameter's contributions from several uses: tied weights, a module called twice."""
    if len(factors) == 1:
        return factors[0]
    outers, rows = [f for f in factors if isinstance(f, Outer)], [f for f in factors if isinstance(f, Rows)]
    if len(outers) + len(rows) < len(factors):
        return _added(factors)
    if outers:
        inputs = torch.cat([f.inputs for f in outers], 1)
        outer = Outer(inputs, torch.cat([f.output_grads for f in outers], 1), outers[0].shape, outers[0].dtype)
    if rows:
        row = _gathered(rows, [f.samples for f in rows], rows[0].batch_size)
    return Tied(outer, row) if outers and rows else outer if outers else row


def _added(factors: list[Factor]) -> Factor:
    first = next((f for f in factors if isinstance(f, Dense) and f.is_own), factors[0])
    total = first if isinstance(first, Dense) and first.is_own else Dense(first.dense().clone(), is_own=True)
    for factor in factors:
        if isinstance(factor, Rows) and factor is not first:
            factor.add_to(total.contributions)
        elif factor is not first:
            total.contributions.add_(factor.dense())
    return total


def join(factors: list[Factor]) -> Factor:
    """One parameter's contributions in several batches as those in their union."""
    if all(isinstance(f, Outer) for f in factors):
        inputs, output_grads = _stacked([f.inputs for f in factors]), _stacked([f.output_grads for f in factors])
        return Outer(inputs, output_grads, factors[0].shape, factors[0].dtype)
    if all(isinstance(f, Rows) for f in factors):
        *starts, batch_size = accumulate((f.batch_size for f in factors), initial=0)
        return _gathered(factors, [start + f.samples for start, f in zip(starts, factors, strict=True)], batch_size)
    return Dense(torch.cat([f.dense() for f in factors]))


def merge(contributions: Tensor | Factor) -> Tensor | Factor:
    """The contributions of all samples as those of one."""
    if type(contributions) is Outer:
        inputs, output_grads = contributions.inputs, contributions.output_grads
        return Outer(
            inputs.flatten(0, 1)[None], output_grads.flatten(0, 1)[None], contributions.shape, contributions.dtype
        )
    if isinstance(contributions, Rows):
        rows = contributions
        samples = torch.zeros_like(rows.samples)
        return Rows(samples, rows.indices, rows.output_grads, rows.shape, 1, rows.is_sparse)
    rows = contributions if isinstance(contributions, Tensor) else contributions.dense()
    return rows.sum(0, keepdim=True)


def _gathered(rows: list[Rows], samples: list[Tensor], batch_size: int) -> Rows:
    """The entries of all of `rows`, which are of the samples given."""
    indices, grads = torch.cat([f.indices for f in rows]), torch.cat([f.output_grads for f in rows])
    is_sparse = all(f.is_sparse for f in rows)
    return Rows(torch.cat(samples), indices, grads, rows[0].shape, batch_size, is_sparse)


def _stacked(sequences: list[Tensor]) -> Tensor:
    """(B_k, T_k, ...) one below the other, filled up with zeros to the longest T_k."""
    length = max(x.shape[1] for x in sequences)
    padding = [x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:]) for x in sequences]
    return torch.cat([torch.cat([x, zeros], 1) for x, zeros in zip(sequences, padding, strict=True)])
