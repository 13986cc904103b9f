"""One parameter's contributions from several uses, from several batches, and of all samples as one.

Forms of the same type are merged without forming gradients. This is the only place that tells the types apart.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from .factor import Dense, Factor
from .outer import Outer
from .rows import Rows, Tied


def sum_uses(factors: list[Factor]) -> Factor:
    """The sum of one parameter's contributions from several uses: of tied weights, or of a module called twice."""
    if len(factors) == 1:
        return factors[0]
    if is_added_up(factors):
        return _added(factors)
    outers, rows = [f for f in factors if isinstance(f, Outer)], [f for f in factors if isinstance(f, Rows)]
    if not rows:
        return _along_time(outers)
    gathered = _gathered(rows, [f.samples for f in rows], rows[0].batch_size)
    return Tied(_along_time(outers), gathered) if outers else gathered


def is_added_up(factors: list[Factor]) -> bool:
    """Whether the sum of these uses is a tensor, which all are added up in."""
    return not all(isinstance(f, (Outer, Rows)) for f in factors)


def added_up(total: Tensor) -> Dense:
    """The contributions of several uses, added up in one tensor, (B, *shape)."""
    return Dense(total, is_own=True, why="added up over its uses")


def _along_time(outers: list[Outer]) -> Outer:
    """The sum of contributions of the same samples: the vectors of all uses, one after another along time."""
    inputs, output_grads = torch.cat([f.inputs for f in outers], 1), torch.cat([f.output_grads for f in outers], 1)
    return Outer(inputs, output_grads, outers[0].shape, outers[0].dtype)


def _added(factors: list[Factor]) -> Dense:
    first = next((f for f in factors if isinstance(f, Dense) and f.is_own), factors[0])
    total = first.dense() if isinstance(first, Dense) and first.is_own else first.dense().clone()
    for factor in factors:
        if isinstance(factor, Rows) and factor is not first:
            factor.add_to(total)
        elif factor is not first:
            total.add_(factor.dense())
    return added_up(total)


def concatenate_batches(factors: list[Factor]) -> Factor:
    """One parameter's contributions in several batches as those in their union."""
    outers, rows = [f for f in factors if isinstance(f, Outer)], [f for f in factors if isinstance(f, Rows)]
    if len(outers) == len(factors):
        inputs, output_grads = _stacked([f.inputs for f in outers]), _stacked([f.output_grads for f in outers])
        return Outer(inputs, output_grads, outers[0].shape, outers[0].dtype)
    if len(rows) == len(factors):
        *starts, batch_size = accumulate((f.batch_size for f in rows), initial=0)
        return _gathered(rows, [start + f.samples for start, f in zip(starts, rows, strict=True)], batch_size)
    return Dense(torch.cat([f.dense() for f in factors]))


def as_one_sample(contributions: Tensor | Factor) -> Tensor | Factor:
    """The contributions of all samples as those of one, (1, *shape); a tensor where they are not kept as a factor."""
    if isinstance(contributions, Outer):
        inputs, output_grads = (x.flatten(0, 1)[None] for x in (contributions.inputs, contributions.output_grads))
        return Outer(inputs, output_grads, contributions.shape, contributions.dtype)
    if isinstance(contributions, Rows):
        rows = contributions
        samples = torch.zeros_like(rows.samples)
        return Rows(samples, rows.indices, rows.output_grads, rows.shape, 1, rows.is_sparse)
    tensor = contributions.dense() if isinstance(contributions, Factor) else contributions
    return tensor.sum(0, keepdim=True)


def _gathered(rows: list[Rows], samples: list[Tensor], batch_size: int) -> Rows:
    """The entries of all of `rows`, which belong to the given samples."""
    indices, grads = torch.cat([f.indices for f in rows]), torch.cat([f.output_grads for f in rows])
    is_sparse = all(f.is_sparse for f in rows)
    return Rows(torch.cat(samples), indices, grads, rows[0].shape, batch_size, is_sparse)


def _stacked(sequences: list[Tensor]) -> Tensor:
    """(B_k, T_k, ...) one below the other, filled up with zeros to the longest T_k."""
    length = max(x.shape[1] for x in sequences)
    padding = [x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:]) for x in sequences]
    return torch.cat([torch.cat([x, zeros], 1) for x, zeros in zip(sequences, padding, strict=True)])


def in_double(factor: Factor) -> Factor:
    """The contributions in float64."""
    if isinstance(factor, Outer):
        inputs, output_grads = factor.inputs.double(), factor.output_grads.double()
        return Outer(inputs, output_grads, factor.shape)
    if isinstance(factor, Rows):
        grads = factor.output_grads.double()
        return Rows(factor.samples, factor.indices, grads, factor.shape, factor.batch_size)
    return Dense(factor.dense().double())
