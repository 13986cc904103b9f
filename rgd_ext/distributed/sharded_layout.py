"""Vectors of the parameter space whose sum over the processes is left in shards, as `.grad` of `fully_shard`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..gradients import squared_norm
from ..linalg import accumulate_dtype
from .buckets import BucketReducer, FlatVector, Layout, Sum
from .group import Group


class ShardedLayout(Layout):
    """The layout of parameters that are sharded over the same mesh along one of its dimensions, or replicated in it.

    A bucket of a sum has a row for each shard, with the part of that shard of each parameter, so that a reduce-scatter
    leaves each process the row that it needs.

    Args:
        named: the parameters and their names.
        shards_of: gives the DTensors of parameters, which optimizers step.
    """

    is_sharded = True

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], shards_of: Callable[[Iterable[nn.Parameter]], list[DTensor]]
    ) -> None:
        super().__init__(named)
        shards = shards_of(self.parameters)
        self._shards_of = shards_of
        self._mesh, self._mesh_dim = shards[0].device_mesh, shard_dim(shards[0].placements)
        rows = 1 if self._mesh_dim is None else self._mesh.size(self._mesh_dim)
        self._cuts = {p: _Cut.of(shard, rows) for p, shard in zip(self.parameters, shards, strict=True)}

    def summed(self, group: Group, what: str, parts: Iterable[tuple[nn.Parameter, Tensor]]) -> Sum:
        buffers, places = self._rows()
        reducer = BucketReducer(self, places, lambda bucket: self._start_sum(group, what, buffers[bucket]))
        for parameter, part in parts:
            reducer.fill(parameter, self._cuts[parameter].rows_of(part))
        reducer.fill_zeros()
        pieces: dict[nn.Parameter, Tensor] = {}
        squares = []
        for bucket, row in reducer.reduced_buckets():
            of_bucket = self.buckets[bucket]
            widths = [self._cuts[p].width for p in of_bucket]
            pieces.update(zip(of_bucket, row.split(widths), strict=True))
            squares.append(squared_norm([row]).double())
        replicas = self._mesh.size() // len(buffers[0])
        return Sum(self._as_shards(pieces), torch.stack(squares).sum() / replicas)

    def written(self, vector: FlatVector) -> dict[nn.Parameter, Tensor]:
        # Copies, which do not keep the vector in memory.
        rows = {p: self._cuts[p].rows_of(part)[self._own_row].clone() for p, part in vector.parts.items()}
        return self._as_shards(rows)

    def keeping(self, vector: FlatVector) -> Callable[[], dict[nn.Parameter, Tensor]]:
        found = self.written(vector)
        return lambda: found

    @cached_property
    def _own_row(self) -> int:
        return 0 if self._mesh_dim is None else self._mesh.get_local_rank(self._mesh_dim)

    def _rows(self) -> tuple[list[Tensor], dict[nn.Parameter, Tensor]]:
        """Buckets, (rows, n), of undefined numbers, and the place of each parameter in them, (rows, width)."""
        places: dict[nn.Parameter, Tensor] = {}
        buffers = []
        for bucket in self.buckets:
            widths, rows = [self._cuts[p].width for p in bucket], self._cuts[bucket[0]].rows
            dtype, device = accumulate_dtype(bucket[0].dtype), bucket[0].device
            buffers.append(torch.empty(rows, sum(widths), dtype=dtype, device=device))
            places.update(zip(bucket, buffers[-1].split(widths, 1), strict=True))
        return buffers, places

    def _start_sum(self, group: Group, what: str, rows: Tensor) -> _PendingRow:
        """Begin to sum a bucket over the processes, of which this one keeps its row."""
        partial = DTensor.from_local(rows, self._mesh, [Partial()] * self._mesh.ndim, run_check=False)
        placements = [Shard(0) if dim == self._mesh_dim else Replicate() for dim in range(self._mesh.ndim)]
        with group.named(what):
            return _PendingRow(group, what, partial.redistribute(placements=placements, async_op=True))

    def _as_shards(self, rows: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """DTensors like the shards of the parameters, given this process's row of each."""
        found: dict[nn.Parameter, Tensor] = {}
        for (parameter, row), like in zip(rows.items(), self._shards_of(rows), strict=True):
            local = like.to_local()
            own = self._cuts[parameter].unpadded(row, local).to(local.dtype)
            found[parameter] = DTensor.from_local(
                own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        return found


class _PendingRow(NamedTuple):
    """A process's row of a sum that is under way."""

    group: Group
    what: str
    found: DTensor

    def wait(self) -> Tensor:
        """The row, flat."""
        with self.group.named(self.what):
            # Views of what a collective gives do not wait for it; a copy does.
            return self.found.to_local().clone().view(-1)


class _Cut(NamedTuple):
    """How a parameter is cut into shards: as by `torch.chunk`, where the last ones may be shorter, or empty.

    Attributes:
        shape: of the parameter, with at least one dimension.
        dim: the dimension that is cut.
        rows: the number of shards.
    """

    shape: tuple[int, ...]
    dim: int
    rows: int

    @classmethod
    def of(cls, shard: DTensor, rows: int) -> _Cut:
        dim = next((placement.dim for placement in shard.placements if isinstance(placement, Shard)), 0)
        return cls(tuple(shard.shape) or (1,), dim, rows)

    @property
    def size(self) -> int:
        """Of a shard, along the dimension that is cut."""
        return -(-self.shape[self.dim] // self.rows)

    def _with_size(self, size: int) -> tuple[int, ...]:
        return *self.shape[: self.dim], size, *self.shape[self.dim + 1 :]

    @property
    def width(self) -> int:
        """How many elements a row has."""
        return torch.Size(self._with_size(self.size)).numel()

    def rows_of(self, part: Tensor) -> Tensor:
        """The shards of a part of a vector, flat, (rows, width), padded with zeros."""
        part = part.reshape(self.shape)
        missing = self.size * self.rows - self.shape[self.dim]
        if missing:
            part = torch.cat([part, part.new_zeros(self._with_size(missing))], self.dim)
        return part.unflatten(self.dim, (self.rows, self.size)).movedim(self.dim, 0).reshape(self.rows, -1)

    def unpadded(self, row: Tensor, like: Tensor) -> Tensor:
        """The shard in a row, in the shape of `like`."""
        padded = row.view(self._with_size(self.size))
        # Shards without elements or without dimensions have no size along `dim`.
        size = like.shape[self.dim] if like.numel() and like.ndim else min(like.numel(), self.size)
        return padded.narrow(self.dim, 0, size).reshape(like.shape)


def shard_dim(placements: Sequence[Placement]) -> int | None:
    """The dimension of the mesh along which a parameter is sharded; None if it is replicated."""
    return next((dim for dim, placement in enumerate(placements) if isinstance(placement, Shard)), None)
