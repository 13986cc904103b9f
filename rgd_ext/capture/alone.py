"""One sample of a batch by itself: its part of the arguments of a call, and of the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice, product
from typing import TypeAlias

import torch
from torch import Tensor

from .batch import tensors_in
from .copies import detached_copy, with_tensors


@dataclass(frozen=True)
class Split:
    """How a tensor holds samples along a dimension with an equal number of places for each.

    Attributes:
        dim: the dimension.
        is_outer: whether the places of a sample lie side by side, as after flatten of (B, T), or B apart.
    """

    dim: int
    is_outer: bool

    def of(self, x: Tensor, sample: int, count: int) -> Tensor:
        """The part of `sample` in a tensor of `count` samples."""
        places = x.shape[self.dim] // count
        if self.is_outer:
            return x.narrow(self.dim, sample * places, places)
        return x.unflatten(self.dim, (places, count)).select(self.dim + 1, sample)

    def scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        """`x` with the parts of all samples multiplied by a factor each."""
        count, places = len(factors), x.shape[self.dim] // len(factors)
        shape = (count, places) if self.is_outer else (places, count)
        following = x.ndim - self.dim - 1 + self.is_outer
        return (x.unflatten(self.dim, shape) * factors.to(x).view(-1, *[1] * following)).view(x.shape)


@dataclass(frozen=True)
class Alone:
    """A forward of copies of one sample.

    Attributes:
        sample: its number in the batch.
        count: of the copies. One is the strictest test, but some models need more.
        outputs: all tensors that the module gave.
        splits: by the place of an output, where the batch's output holds the sample; None where all share it. Outputs
            whose shapes do not fit, such as products between all samples, are left out.
        difference: the largest between the outputs for a copy and the sample's part of the batch's, relative to its
            norm; infinite where they are not finite.
    """

    sample: int
    count: int
    outputs: Sequence[Tensor]
    splits: dict[int, Split | None]
    difference: float

    def cotangent(self, number: int, of_batch: Tensor, batch_size: int) -> Tensor:
        """For the output of that number, what `of_batch` is to the sample in the batch."""
        split, output = self.splits[number], self.outputs[number]
        if split is None:
            return of_batch
        part = split.of(of_batch, self.sample, batch_size)
        if self.count == 1:
            return part.reshape(output.shape)
        found = output.new_zeros(output.shape)
        split.of(found, _place(self.sample, self.count, batch_size), self.count).copy_(part)
        return found


def _place(sample: int, count: int, batch_size: int) -> int:
    """The number of the copy that stands for the sample: where it stood, if all others became copies of it."""
    return sample if count == batch_size else 0


# Readings that are tried.
_MOST = 32
# Arguments and keywords of a call -> those of some samples, given their indices.
Reading: TypeAlias = Callable[[Tensor], tuple[tuple, dict]]
# A tensor of a batch, and the numbers of some samples -> the tensor of these.
Cut: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def readings(args: tuple, kwargs: dict, batch_size: int, at: int = 0) -> Iterator[Reading]:
    """Ways to take samples out of the arguments, the usual one first.

    The samples of a tensor lie along dimension 0 in all of them, or 1; or along `at`, if that is another than 0, and
    along 0 in some. All but the first tensor may be shared.
    """
    tensors = tensors_in((args, kwargs))
    for dims in ((at, 0),) if at else ((0,), (1,)):
        places = [[d for d in dims if x.ndim > d and x.shape[d] == batch_size] for x in tensors]
        first = next((n for n, found in enumerate(places) if found), None)
        if first is not None:
            choices = [found[:1] if n == first else [*found, None] for n, found in enumerate(places)]
            for chosen in islice(_by_rank(choices), _MOST):
                cuts = [None if dim is None else partial(_selected, dim) for dim in chosen]
                yield partial(taken, (args, kwargs), cuts)


def _by_rank(choices: Sequence[Sequence[int | None]]) -> Iterator[list[int | None]]:
    """One of each of `choices`; those come first in which most are the first of theirs."""
    others = [n for n, found in enumerate(choices) if len(found) > 1]
    for number in range(len(others) + 1):
        for changed in combinations(others, number):
            for chosen in product(*[found[1:] if n in changed else found[:1] for n, found in enumerate(choices)]):
                yield list(chosen)


def taken(tree: tuple[tuple, dict], cuts: Sequence[Cut | None], samples: Tensor) -> tuple[tuple, dict]:
    """Some samples of the arguments of a call, given the cut for each of the tensors in it; None where all share it."""
    found = iter(cuts)

    def of_tensor(x: Tensor) -> Tensor:
        cut = next(found)
        return detached_copy(x) if cut is None else cut(x.detach(), samples).requires_grad_(x.requires_grad)

    return with_tensors(of_tensor, tree)


def _selected(dim: int, x: Tensor, samples: Tensor) -> Tensor:
    samples = samples.to(x.device)
    if x.layout in (torch.strided, torch.sparse_coo):
        return x.index_select(dim, samples)
    if x.is_nested:
        return torch.nested.as_nested_tensor([x[i] for i in samples.tolist()], layout=x.layout)
    return x.to_sparse_coo().index_select(dim, samples).to_sparse(layout=x.layout)


def alone_in(
    batch: dict[int, Tensor], sample: int, batch_size: int, outputs: Sequence[Tensor], count: int
) -> Alone | None:
    """The outputs for copies of a sample beside some outputs for its batch; None if the shapes of none fit."""
    if len(outputs) <= max(batch):
        return None
    splits, largest, place = {}, 0.0, _place(sample, count, batch_size)
    for number, whole in batch.items():
        output = outputs[number]
        differences = {
            split: _difference(
                split.of(whole, sample, batch_size), output if count == 1 else split.of(output, place, count)
            )
            for split in _splits(whole, output, batch_size, count)
        }
        if differences:
            splits[number] = min(differences, key=differences.get)
            largest = max(largest, differences[splits[number]])
        elif output.shape == whole.shape:
            splits[number] = None
    return Alone(sample, count, outputs, splits, largest) if splits else None


def _splits(whole: Tensor, output: Tensor, batch_size: int, count: int) -> list[Split]:
    """How `whole` can hold the samples, if so many of them give `output`."""
    exact, squeezed = [], []
    for dim, size in enumerate(whole.shape):
        if size == 0 or size % batch_size:
            continue
        shape = [*whole.shape]
        shape[dim] = size // batch_size * count
        forms = [Split(dim, True)] if size == batch_size else [Split(dim, True), Split(dim, False)]
        if shape == [*output.shape]:
            exact += forms
        elif count == 1 and [n for n in shape if n > 1] == [n for n in output.shape if n > 1]:
            squeezed += forms
    return exact or squeezed


def _difference(part: Tensor, alone: Tensor) -> float:
    part, alone = part.detach().double(), alone.detach().double().reshape(part.shape)
    norm, difference = part.norm().item(), (part - alone).norm().item()
    return difference / (norm or 1.0) if math.isfinite(difference) else math.inf
