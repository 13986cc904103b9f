"""A forward of one sample of a batch by itself, and how its outputs are parts of those of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """How a tensor holds samples along a dimension with an equal number of places for each.

    Attributes:
        dim: the dimension.
        is_outer: whether the places of a sample lie side by side, as after flatten of (B, T), instead of B apart.
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
class SampleForward:
    """A forward of copies of one sample.

    Attributes:
        index: the index of the sample in the batch.
        count: the number of copies. One is the strictest test, but some models need more.
        outputs: all tensors that the module gave.
        splits: by the place of an output, where the batch's output holds the sample; None where all share it. Outputs
            whose shapes do not fit, such as products between all samples, are left out.
        difference: the largest difference between the outputs for a copy and the sample's part of the batch's, relative
            to the norm of this part; infinite where they are not finite.
    """

    index: int
    count: int
    outputs: Sequence[Tensor]
    splits: dict[int, Split | None]
    difference: float

    def cotangent(self, number: int, of_batch: Tensor, batch_size: int) -> Tensor:
        """The cotangent of one of the outputs, by its place, as `of_batch` has it for the sample in the batch."""
        split, output = self.splits[number], self.outputs[number]
        if split is None:
            return of_batch
        part = split.of(of_batch, self.index, batch_size)
        if self.count == 1:
            return part.reshape(output.shape)
        found = output.new_zeros(output.shape)
        split.of(found, _place(self.index, self.count, batch_size), self.count).copy_(part)
        return found


def _place(sample: int, count: int, batch_size: int) -> int:
    """The index of the copy that stands for the sample: where the sample stood, if all others became copies of it."""
    return sample if count == batch_size else 0


def compared_with(
    batch: dict[int, Tensor], sample: int, batch_size: int, outputs: Sequence[Tensor], count: int
) -> SampleForward | None:
    """The forward of copies of a sample that gave `outputs`, compared with outputs of its batch, by their places.

    None if the shapes of no output fit.
    """
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
    return SampleForward(sample, count, outputs, splits, largest) if splits else None


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


def _difference(part: Tensor, output: Tensor) -> float:
    part, output = part.detach().double(), output.detach().double().reshape(part.shape)
    norm, difference = part.norm().item(), (part - output).norm().item()
    return difference / (norm or 1.0) if math.isfinite(difference) else math.inf
