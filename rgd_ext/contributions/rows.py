"""The contributions to an embedding's table."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..gradients import Moments
from ..linalg import accumulate_dtype, sum_rows
from .blockwise import Blockwise
from .buffers import Empty
from .cost import Cost
from .factor import Dense, Factor, moments_from_gram
from .outer import Outer


class Rows(Factor):
    """Contributions that consist of entries, each of which adds an output gradient to one row of one h_i.

    Args:
        samples: the i of each entry, (N,), int64.
        indices: the row of each entry, (N,), int64.
        output_grads: E, (N, n).
        shape: the shape of the parameter, (rows, n).
        batch_size: B.
        is_sparse: whether the parameter's ordinary gradient is a sparse tensor.
    """

    why = "products of the rows that samples share"

    # How many elements the products that are formed at a time have.
    _PRODUCTS = 1 << 20

    def __init__(
        self,
        samples: Tensor,
        indices: Tensor,
        output_grads: Tensor,
        shape: torch.Size,
        batch_size: int,
        is_sparse: bool = False,
    ) -> None:
        self.samples, self.indices, self.output_grads = samples, indices, output_grads
        self.shape, self.is_sparse, self._batch_size = shape, is_sparse, batch_size

    @classmethod
    def of_sequences(cls, indices: Tensor, output_grads: Tensor, shape: torch.Size, is_sparse: bool = False) -> Rows:
        """Contributions with equally many entries for each sample.

        Args:
            indices: (B, T).
            output_grads: (B, T, n).
            shape, is_sparse: as for `Rows`.
        """
        batch_size = indices.shape[0]
        samples = torch.arange(batch_size, device=indices.device)[:, None].expand_as(indices).reshape(-1)
        grads = output_grads.reshape(-1, output_grads.shape[-1])
        return cls(samples, indices.reshape(-1), grads, shape, batch_size, is_sparse)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def example(self) -> Tensor:
        return self.output_grads

    @property
    def signature(self) -> tuple:
        return self.output_grads.shape, self.batch_size

    def strategies(self, needs_gram: bool) -> dict[str, Cost]:
        nbytes, elements, held = self.output_grads.nbytes, self.output_grads.numel(), self.plain().held
        # How many samples share a row depends on the values. The estimate is that all of them do.
        return {"ghost": Cost(product=2 * self.batch_size * elements, stream=6 * nbytes, calls=30, held=held)}

    def plain(self) -> Cost:
        held = self.output_grads.nbytes + self.indices.nbytes
        return Cost(stream=3 * self.output_grads.nbytes, calls=1, held=held)

    def gram(self) -> Tensor:
        """K_ij, the sum over the rows r of <(h_i)_r, (h_j)_r>."""
        if self.output_grads.is_cpu:
            return self._gram_by_rows()
        sums = _SummedEntries(self)
        return torch.ops.rgd_ext.embedding_gram(sums.keys, sums.values, self.shape[0], self.batch_size)

    def _gram_by_rows(self) -> Tensor:
        """`gram`, with one product for all rows that the same number of samples use."""
        batch_size, width = self.batch_size, self.output_grads.shape[1]
        used, place = (self.indices * batch_size + self.samples).unique(return_inverse=True)
        _, row, sharers = (used // batch_size).unique_consecutive(return_inverse=True, return_counts=True)
        order = sharers[row].argsort(stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        sample = (used % batch_size)[order]
        grads = self.output_grads.new_zeros(used.numel(), width, dtype=accumulate_dtype(self.output_grads.dtype))
        grads.index_add_(0, rank[place], self.output_grads.to(grads))
        gram, start = grads.new_zeros(batch_size**2), 0
        for number, rows in torch.stack(sharers.unique(return_counts=True), 1).tolist():
            stop = start + number * rows
            chunk = number * max(1, self._PRODUCTS // number**2)
            for x, i in zip(grads[start:stop].split(chunk), sample[start:stop].split(chunk), strict=True):
                x, i = x.view(-1, number, width), i.view(-1, number)
                gram.index_add_(0, (i[:, :, None] * batch_size + i[:, None]).flatten(), (x @ x.mT).flatten())
            start = stop
        return gram.view(batch_size, batch_size)

    def moments(self) -> Moments:
        return moments_from_gram(self.gram())

    def align(self, vector: Tensor) -> Tensor:
        products = (vector.to(accumulate_dtype(vector.dtype))[self.indices] * self.output_grads).sum(1)
        return sum_rows(products, self.samples, self.batch_size)

    def combine(self, weights: Tensor) -> Tensor:
        return sum_rows(self._weighted(weights), self.indices, self.shape[0]).to(self.output_grads.dtype)

    def combine_sparse(self, weights: Tensor) -> Tensor:
        """`combine` as torch leaves a sparse gradient: with one entry for each of these entries."""
        values = self._weighted(weights).to(self.output_grads.dtype)
        return torch.sparse_coo_tensor(self.indices[None], values, self.shape, check_invariants=False)

    def _weighted(self, weights: Tensor) -> Tensor:
        return self.output_grads * weights[self.samples, None]

    def dense(self) -> Tensor:
        return self.add_to(self.output_grads.new_zeros(self.batch_size, *self.shape))

    def add_to(self, contributions: Tensor) -> Tensor:
        """`contributions`, (B, *shape), with these added in place."""
        rows = contributions.view(-1, *self.shape[1:])
        if rows.is_cpu:
            rows.index_add_(0, self.keys(), self.output_grads)
        else:
            sums = _SummedEntries(self)
            rows[sums.keys] += sums.at(sums.keys).to(rows)  # equal keys write equal values
        return contributions

    def keys(self) -> Tensor:
        """The row of each entry in the stack of the tables of all samples, (N,)."""
        return self.indices + self.samples * self.shape[0]


class _SortedEntries:
    """The entries of some `Rows` on the CPU, in the order of their rows."""

    def __init__(self, entries: Rows) -> None:
        order = entries.indices.argsort(stable=True)
        self._row, self._sample = entries.indices[order], entries.samples[order]
        self._grads = entries.output_grads[order]

    def add_to(self, block: Tensor, start: int) -> None:
        """Add the entries in the rows from `start` on to `block`, (B, number of rows, n)."""
        batch_size, number, width = block.shape
        first, last = torch.searchsorted(self._row, torch.tensor([start, start + number])).tolist()
        places = self._sample[first:last] * number + self._row[first:last] - start
        block.view(batch_size * number, width).index_add_(0, places, self._grads[first:last].to(block))


class _SummedEntries:
    """The sums of the entries that have the same sample and the same row.

    The number of sums depends on the indices. There is room for one per entry, so that the host need not wait for that
    number, and all of this can be part of a CUDA graph.

    Attributes:
        keys: `Rows.keys` in ascending order, (N,).
        values: (N, n); where a key comes first, the sum of all entries that have it, and zeros elsewhere.
    """

    def __init__(self, entries: Rows) -> None:
        keys, grads = entries.keys(), entries.output_grads
        self._table_rows = entries.shape[0]
        self.keys = keys.sort().values
        places = torch.searchsorted(self.keys, keys)
        self.values = sum_rows(grads.to(accumulate_dtype(grads.dtype)), places, len(keys))

    def at(self, keys: Tensor) -> Tensor:
        """The sums of the entries with the given keys, (number of keys, n); zero for keys that no entry has."""
        if not len(self.keys):
            return self.values.new_zeros(len(keys), self.values.shape[1])
        places = torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)
        return self.values[places].masked_fill_((self.keys[places] != keys)[:, None], 0)

    def add_to(self, block: Tensor, start: int) -> None:
        """Add the entries in the rows from `start` on to `block`, (B, number of rows, n)."""
        batch_size, number, width = block.shape
        samples, rows = torch.arange(batch_size, device=block.device), torch.arange(number, device=block.device)
        keys = samples[:, None] * self._table_rows + rows + start
        block.view(-1, width).add_(self.at(keys.flatten()))


class Tied(Blockwise):
    """The sum of an `Outer` and some `Rows`, for an embedding whose table is the weight of the head too."""

    def __init__(self, outer: Outer, rows: Rows) -> None:
        self.outer, self.rows = outer, rows

    @property
    def example(self) -> Tensor:
        return self.outer.example

    @property
    def batch_size(self) -> int:
        return self.outer.batch_size

    @property
    def signature(self) -> tuple:
        return *self.outer.signature, *self.rows.signature

    def strategies(self, needs_gram: bool) -> dict[str, Cost]:
        (of_rows,) = self.rows.strategies(needs_gram).values()
        return {name: of_outer + of_rows for name, of_outer in self.outer.forming_strategies(needs_gram).items()}

    def plain(self) -> Cost:
        return self.outer.plain() + self.rows.plain()

    def apply(self, strategy: str, empty: Empty) -> Factor:
        if strategy == "recompute":
            return self
        return Dense(self.rows.add_to(self.outer.formed(empty)), is_own=True)

    def blocks(self) -> Iterator[Tensor]:
        entries = (_SortedEntries if self.example.is_cpu else _SummedEntries)(self.rows)
        start = 0
        for block in self.outer.blocks():
            entries.add_to(block, start)
            yield block
            start += block.shape[1]

    def align(self, vector: Tensor) -> Tensor:
        return self.outer.align(vector) + self.rows.align(vector)

    def combine(self, weights: Tensor) -> Tensor:
        return self.outer.combine(weights) + self.rows.combine(weights)

    def dense(self) -> Tensor:
        return self.rows.add_to(self.outer.dense())
