"""Samples of different lengths that stand one behind the other in flat vectors, with their offsets or lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ...nests import tensors_in
from .readings import Cut, Reading, taken

# A vector of whole numbers, a flat vector, and B -> where the samples start and the last one ends, (B + 1,), or None
# if the vector does not hold offsets or lengths of samples in the flat one.
_Read: TypeAlias = Callable[[Tensor, Tensor, int], Tensor | None]


def ragged_readings(args: tuple, kwargs: dict, batch_size: int) -> Iterator[Reading]:
    """Ways to take samples out of the arguments, where flat vectors are among them."""
    tensors = tensors_in((args, kwargs))
    for read, cut in ((_bounds_of_offsets, _offsets), (_bounds_of_lengths, _lengths)):
        cuts: list[Cut | None] = [_rows if x.ndim and x.shape[0] == batch_size else None for x in tensors]
        pairs = _pairs(tensors, batch_size, read)
        for flat, owner in pairs:
            bounds = read(tensors[owner], tensors[flat], batch_size)
            cuts[flat], cuts[owner] = partial(_entries, bounds), partial(cut, bounds)
        if pairs:
            yield partial(taken, (args, kwargs), cuts)


def _pairs(tensors: Sequence[Tensor], batch_size: int, read: _Read) -> list[tuple[int, int]]:
    """The places of flat vectors, each with that of its offsets or lengths: one vector for all, or for each."""
    vectors = [n for n, x in enumerate(tensors) if x.ndim == 1 and x.layout == torch.strided]

    def fits(owner: int, flat: int) -> bool:
        is_possible = owner != flat and _may_be_bounds(tensors[owner], batch_size)
        return is_possible and read(tensors[owner], tensors[flat], batch_size) is not None

    owners = [n for n in vectors if any(fits(n, flat) for flat in vectors)]
    others = [n for n in vectors if n not in owners]
    flats = [n for n in others if len(tensors[n]) != batch_size] or others
    if len(owners) == 1:
        owners *= len(flats)
    pairs = list(zip(flats, owners, strict=False))
    return pairs if len(flats) == len(owners) and all(fits(owner, flat) for flat, owner in pairs) else []


def _may_be_bounds(x: Tensor, batch_size: int) -> bool:
    return not x.dtype.is_floating_point and 0 <= len(x) - batch_size <= 1


def _bounds_of_offsets(x: Tensor, flat: Tensor, batch_size: int) -> Tensor | None:
    bounds = torch.cat([x.long().cpu(), torch.tensor([len(flat)])])
    return bounds[: batch_size + 1] if bounds[0] == 0 and (bounds.diff() >= 0).all() else None


def _bounds_of_lengths(x: Tensor, flat: Tensor, batch_size: int) -> Tensor | None:
    # Indices may add up to the number of offsets by chance; torch crashes on offsets that are cut like a flat vector.
    if _may_be_bounds(flat, batch_size) and _bounds_of_offsets(flat, x, batch_size) is not None:
        return None
    bounds = torch.cat([torch.tensor([0]), x.long().cpu().cumsum(0)])
    return bounds if len(x) == batch_size and bounds[-1] == len(flat) and (x >= 0).all() else None


def _rows(x: Tensor, samples: Tensor) -> Tensor:
    return x[samples.to(x.device)]


def _entries(bounds: Tensor, x: Tensor, samples: Tensor) -> Tensor:
    places = [torch.arange(bounds[i], bounds[i + 1]) for i in samples.tolist()]
    return x[torch.cat(places).to(x.device)]


def _offsets(bounds: Tensor, x: Tensor, samples: Tensor) -> Tensor:
    ends = bounds.diff()[samples].cumsum(0)
    has_end = len(x) == len(bounds)
    return torch.cat([ends.new_zeros(1), ends if has_end else ends[:-1]]).to(x)


def _lengths(bounds: Tensor, x: Tensor, samples: Tensor) -> Tensor:
    return bounds.diff()[samples].to(x)
