"""Vectors of the parameter space in buckets: flat tensors of many parameters, each of which is one message."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import filterfalse
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..gradients import squared_norm, total
from ..linalg import accumulate_dtype
from .group import Group

# Bytes of a bucket, unless one parameter takes more. As in DistributedDataParallel: smaller messages wait for the
# latency of the network, and with larger ones less of them is on its way while the backward still runs.
BUCKET_BYTES = 25 << 20
# Elements from which on a parameter is large. Small ones have buckets of their own, which are sent at the end of the
# backward, since layers with few parameters wait for it.
LARGE = 1 << 14


class Sum(NamedTuple):
    """A sum over the processes, in the form that is written to `.grad`.

    Attributes:
        parts: the part of each parameter.
        square: its squared norm. With a sharded layout a share of it; those of all processes add up to it.
    """

    parts: dict[nn.Parameter, Tensor]
    square: Tensor


class Layout:
    """Which part of which bucket belongs to which parameter; the same in all processes.

    Buckets hold the dtype in which sums are accumulated, float32 for 16 bits. They are filled in the reverse order of
    the model, about that of a backward, those of large parameters first.

    Args:
        named: the trainable parameters and their names, in the order of the model.

    Attributes:
        parameters: these parameters, in the order of the buckets.
        names: their names.
        buckets: the parameters of each bucket.
        bucket_of: the number of the bucket of each parameter.
        is_sharded: whether each process has its own parts of what is written to `.grad`.
    """

    is_sharded = False

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        names = {id(parameter): name for name, parameter in named}
        groups: dict[tuple[bool, torch.dtype, torch.device], list[list[nn.Parameter]]] = {}
        reverse = [parameter for _, parameter in reversed(named)]
        for parameter in (*filter(is_large, reverse), *filterfalse(is_large, reverse)):
            kind = is_large(parameter), accumulate_dtype(parameter.dtype), parameter.device
            of_kind = groups.setdefault(kind, [[]])
            if of_kind[-1] and _nbytes([*of_kind[-1], parameter]) > BUCKET_BYTES:
                of_kind.append([])
            of_kind[-1].append(parameter)
        self.buckets = [bucket for of_kind in groups.values() for bucket in of_kind]
        self.parameters = [p for bucket in self.buckets for p in bucket]
        self.names = [names[id(p)] for p in self.parameters]
        self.bucket_of = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}

    @cached_property
    def digest(self) -> int:
        """A number of 63 bits that tells layouts apart."""
        described = [(n, tuple(p.shape), str(p.dtype)) for n, p in zip(self.names, self.parameters, strict=True)]
        return number_of(described)

    def empty(self) -> FlatVector:
        """A vector of undefined numbers."""
        buffers = []
        for bucket in self.buckets:
            dtype, device = accumulate_dtype(bucket[0].dtype), bucket[0].device
            buffers.append(torch.empty(sum(p.numel() for p in bucket), dtype=dtype, device=device))
        return FlatVector(self, buffers)

    def written(self, vector: FlatVector) -> dict[nn.Parameter, Tensor]:
        """The parts of a vector, in the form that is written to `.grad`."""
        return {p: part.to(p.dtype) for p, part in vector.parts.items()}

    def keeping(self, vector: FlatVector) -> Callable[[], dict[nn.Parameter, Tensor]]:
        """A function that gives `written(vector)`. A sharded vector is cut at once, and need not stay in memory."""
        return partial(self.written, vector)

    def summed(self, group: Group, what: str, parts: Iterable[tuple[nn.Parameter, Tensor]]) -> Sum:
        """The sum over the processes of vectors of which each passes its parts; those that it lacks are zero."""
        found = all_reduced(self, group, what, parts)
        return Sum(self.written(found), found.squared_norm())


class FlatVector:
    """A vector of the parameter space in buckets.

    Args:
        layout: of the buckets.
        buffers: the buckets, flat.

    Attributes:
        layout, buffers: as given.
        parts: the part of each parameter, in its shape: views of the buffers.
    """

    def __init__(self, layout: Layout, buffers: list[Tensor]) -> None:
        self.layout, self.buffers = layout, buffers
        pairs = [pair for each in zip(layout.buckets, buffers, strict=True) for pair in _parts(*each)]
        self.parts = dict(pairs)

    def parts_of(self, bucket: int) -> dict[nn.Parameter, Tensor]:
        """The parts of the parameters of a bucket."""
        return {p: self.parts[p] for p in self.layout.buckets[bucket]}

    def squared_norm(self) -> Tensor:
        """|v|^2."""
        return squared_norm(self.buffers)


class Pending(Protocol):
    """A sum over the processes that is under way."""

    def wait(self) -> Any:
        """Wait for it; may return what this process keeps of it."""


class BucketReducer:
    """Sums of buckets of a vector over the processes, which begin in the order of the buckets, each when it is filled.

    Args:
        layout: of the buckets.
        places: where the part of each parameter in this process's summand goes.
        start: begins the sum of a bucket, given its number.
    """

    def __init__(self, layout: Layout, places: Mapping[nn.Parameter, Tensor], start: Callable[[int], Pending]) -> None:
        self._layout, self._places, self._start = layout, places, start
        self._filled: set[nn.Parameter] = set()
        self._missing = [len(bucket) for bucket in layout.buckets]
        self._pending: list[Pending] = []

    @classmethod
    def of_vector(cls, vector: FlatVector, group: Group, what: str) -> BucketReducer:
        """All-reduces of a vector: the summand of this process is replaced by the sum; `what` names it in errors."""
        return cls(vector.layout, vector.parts, lambda bucket: group.start_all_reduce(what, vector.buffers[bucket]))

    def is_filled(self, parameter: nn.Parameter) -> bool:
        """Whether the part of a parameter has been entered."""
        return parameter in self._filled

    def fill(self, parameter: nn.Parameter, part: Tensor) -> None:
        """Enter the part of a parameter, and begin the sums that wait for it."""
        self._places[parameter].copy_(part)
        self._note(parameter)

    def _note(self, parameter: nn.Parameter) -> None:
        self._filled.add(parameter)
        self._missing[self._layout.bucket_of[parameter]] -= 1
        while (bucket := len(self._pending)) < len(self._missing) and not self._missing[bucket]:
            self._pending.append(self._start(bucket))

    def fill_zeros(self) -> None:
        """Enter zeros for the parameters that have no part, so that all sums begin."""
        for parameter, place in self._places.items():
            if not self.is_filled(parameter):
                place.zero_()
                self._note(parameter)

    def reduced_buckets(self) -> Iterator[tuple[int, Any]]:
        """The number of each bucket, when its sum is there, and what this process keeps of it."""
        for bucket, pending in enumerate(self._pending):
            yield bucket, pending.wait()


def all_reduced(layout: Layout, group: Group, what: str, parts: Iterable[tuple[nn.Parameter, Tensor]]) -> FlatVector:
    """The sum over the processes of vectors of which each passes its parts; those that it lacks are zero.

    Buckets are on their way while later parts are computed.
    """
    found = layout.empty()
    reducer = BucketReducer.of_vector(found, group, what)
    for parameter, part in parts:
        reducer.fill(parameter, part)
    reducer.fill_zeros()
    for _ in reducer.reduced_buckets():
        pass
    return found


def digest_of(layouts: Sequence[Layout]) -> int:
    """A number of 63 bits that tells lists of layouts apart."""
    if len(layouts) == 1:
        return layouts[0].digest
    return number_of([layout.digest for layout in layouts])


def dot(vector: Mapping[nn.Parameter, Tensor], other: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """<v, w> of two vectors whose parts are given by parameter."""
    return total([torch.dot(part.reshape(-1), other[p].reshape(-1)) for p, part in vector.items()])


def is_large(parameter: nn.Parameter) -> bool:
    """Whether it has many elements."""
    return parameter.numel() >= LARGE


def number_of(described: object) -> int:
    """A number of 63 bits that tells representations apart."""
    return int.from_bytes(hashlib.sha256(repr(described).encode()).digest()[:8], "big") >> 1


def _nbytes(bucket: list[nn.Parameter]) -> int:
    return sum(p.numel() * accumulate_dtype(p.dtype).itemsize for p in bucket)


def _parts(bucket: list[nn.Parameter], buffer: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    pieces = buffer.split([p.numel() for p in bucket])
    return [(p, piece.view(p.shape)) for p, piece in zip(bucket, pieces, strict=True)]
