"""Run a function on every sample by itself, as `torch.func.vmap` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch._functorch.vmap import lazy_load_decompositions, vmap_increment_nesting
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree


class Unequal(ValueError):  # noqa: N818
    """Samples differ in what they must have in common."""


@dataclass(frozen=True, eq=False)
class Mapped:
    """An argument with one value per sample, (B, ...)."""

    samples: Tensor

    @classmethod
    def batches_of_one(cls, x: Tensor, dim: int) -> Mapped:
        """The samples along `dim` of `x`, each with that dimension kept as 1."""
        if x.layout not in (torch.strided, torch.sparse_coo):
            x = x.to_sparse_coo()  # the others have no batches of one
        return cls((x.movedim(dim, 0) if dim else x).unsqueeze(dim + 1))


@dataclass(frozen=True)
class Samples:
    """The samples of a batch while a function runs on each of them.

    Attributes:
        number: B.
        level: of the vmap under way.
    """

    number: int
    level: int

    def split(self, x: Tensor) -> Tensor:
        """What stands for a sample's part of `x`, (B, ...), in the function: a tensor without that dimension."""
        return _functorch._add_batch_dim(x, 0, self.level)

    def joined(self, x: Tensor) -> Tensor:
        """The values of `x` in all samples, (B, ...)."""
        return _functorch._remove_batch_dim(x, self.level, self.number, 0)

    def arguments(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Those of a sample, given nests in which a `Mapped` stands for its samples."""
        if len(args) == 1 and isinstance(args[0], Mapped) and not kwargs:  # nearly always
            return (self.split(args[0].samples),), kwargs
        # One tensor for one `Mapped`: torch compares some arguments by identity.
        return pytree.tree_map_only(Mapped, cache(lambda x: self.split(x.samples)), (args, kwargs))

    def results(self, result: object) -> object:
        """Those of all samples, with the samples in front of the tensors in a nest."""
        return self.joined(result) if isinstance(result, Tensor) else pytree.tree_map_only(Tensor, self.joined, result)

    def is_innermost_transform(self) -> bool:
        """Whether the function is not inside a transform of its own, such as `torch.func.grad`."""
        return _functorch.maybe_current_level() == self.level


def differs(x: Tensor) -> bool:
    """Whether the value of `x` may differ between the samples."""
    return _functorch.is_functorch_wrapped_tensor(x)


# Outside of all samples, as if none were looked at.
outside_vmap = temporarily_pop_interpreter_stack


@contextmanager
def each_of(number: int) -> Iterator[Samples]:
    """What runs inside runs on each of `number` samples, with random numbers of its own."""
    lazy_load_decompositions()
    # The fused attention kernels have no batching rule; vmap would loop over the samples.
    with sdpa_kernel(SDPBackend.MATH), vmap_increment_nesting(number, "different") as level:
        yield Samples(number, level)


@contextmanager
def fallback_warnings(are_on: bool) -> Iterator[None]:
    """Torch's warnings where vmap takes one sample after the other; its default, on, is restored."""
    _functorch._set_vmap_fallback_warning_enabled(are_on)
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)


def map_samples(function: Callable, args: tuple, kwargs: dict) -> object:
    """`function(*args, **kwargs)` for each sample, with random numbers of its own.

    Args:
        function: from one sample to any nest of tensors and other values.
        args, kwargs: nests in which a `Mapped` stands for its samples; all else goes to every sample as it is.

    Returns:
        The nest, with the samples in front of its tensors.
    """
    mapped = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Mapped))
    with each_of(len(mapped.samples)) as samples:
        args, kwargs = samples.arguments(args, kwargs)
        return samples.results(function(*args, **kwargs))


def loop_samples(function: Callable, args: tuple, kwargs: dict) -> object:
    """What `map_samples` gives, by a call of `function` for each sample.

    Raises:
        Unequal: if results of samples differ in their structure, in shapes, or in what is no tensor.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Mapped)]
    # Each sample gets memory of its own: the function may change it in place.
    columns = [[x.clone() for x in _each(leaves[slot].samples)] for slot in slots]
    outputs, kinds, structures = [], [], []
    for row in zip(*columns, strict=True):
        for slot, sample in zip(slots, row, strict=True):
            leaves[slot] = sample
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        results, structure = pytree.tree_flatten(function(*args, **kwargs))
        outputs.append([value for value in results if isinstance(value, Tensor)])
        kinds.append([tuple(x.shape) if isinstance(x, Tensor) else x for x in results])
        structures.append(structure)
        if structure != structures[0]:
            raise Unequal("its results have another structure for one sample than for another")
        if not all(map(_is_equal, kinds[0], kinds[-1])):
            raise Unequal(f"it gives {kinds[0]} for one sample and {kinds[-1]} for another")
    joined = map(torch.stack, zip(*outputs, strict=True))
    return pytree.tree_unflatten([next(joined) if isinstance(x, Tensor) else x for x in results], structure)


def _is_equal(a: object, b: object) -> bool:
    """Whether two values that are no tensors are the same, as NaN is."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return a is b or (type(a) is type(b) and (a == b) is True)


def _each(samples: Tensor) -> Iterable[Tensor]:
    return samples.unbind() if samples.layout == torch.strided else samples
