"""Functions run on every sample by itself: with the machinery of `torch.func.vmap`, or in a loop."""

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


class UnequalSamples(ValueError):  # noqa: N818
    """Samples differ in something that they must have in common."""


@dataclass(frozen=True, eq=False)
class MappedArgument:
    """An argument of which every sample gets its own value.

    Attributes:
        samples: the values, (B, ...).
    """

    samples: Tensor

    @classmethod
    def batches_of_one(cls, x: Tensor, dim: int) -> MappedArgument:
        """The samples along dimension `dim` of `x`, each as a batch of one: with a dimension of size 1 there."""
        if x.layout not in (torch.strided, torch.sparse_coo):
            x = x.to_sparse_coo()  # other layouts have no dimensions of size 1 to add
        return cls((x.movedim(dim, 0) if dim else x).unsqueeze(dim + 1))


@dataclass(frozen=True)
class Samples:
    """The samples of a batch while a function runs on each of them under vmap.

    Attributes:
        batch_size: B.
        level: the level of the vmap.
    """

    batch_size: int
    level: int

    def split(self, x: Tensor) -> Tensor:
        """The tensor that the function sees for the values `x`, (B, ...), one for each sample: without dimension 0."""
        return _functorch._add_batch_dim(x, 0, self.level)

    def join(self, x: Tensor) -> Tensor:
        """The values of all samples, (B, ...), for a tensor `x` that the function sees."""
        return _functorch._remove_batch_dim(x, self.level, self.batch_size, 0)

    def arguments(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of one sample, for arguments in which a `MappedArgument` has those of all samples."""
        if len(args) == 1 and isinstance(args[0], MappedArgument) and not kwargs:  # nearly always
            return (self.split(args[0].samples),), kwargs
        # One tensor for one `MappedArgument`: torch compares some arguments by identity.
        return pytree.tree_map_only(MappedArgument, cache(lambda x: self.split(x.samples)), (args, kwargs))

    def results(self, result: object) -> object:
        """The results of all samples, with the samples along dimension 0 of each tensor, for the result of one."""
        return self.join(result) if isinstance(result, Tensor) else pytree.tree_map_only(Tensor, self.join, result)

    def is_innermost_transform(self) -> bool:
        """Whether the function is not inside a transform that it applies itself, such as `torch.func.grad`."""
        return _functorch.maybe_current_level() == self.level


def is_per_sample(x: Tensor) -> bool:
    """Whether the value of `x` may differ between the samples."""
    return _functorch.is_functorch_wrapped_tensor(x)


# A context outside of the vmap, in which tensors have their dimension of the samples.
outside_vmap = temporarily_pop_interpreter_stack


@contextmanager
def each_sample(batch_size: int) -> Iterator[Samples]:
    """A context whose code runs on each of the samples under vmap, with random numbers of its own for each."""
    lazy_load_decompositions()
    # The fused attention kernels have no batching rule; vmap would loop over the samples.
    with sdpa_kernel(SDPBackend.MATH), vmap_increment_nesting(batch_size, "different") as level:
        yield Samples(batch_size, level)


@contextmanager
def fallback_warnings(are_on: bool) -> Iterator[None]:
    """Switch the warnings of torch about operators that vmap runs in a loop; torch's default, on, is restored."""
    _functorch._set_vmap_fallback_warning_enabled(are_on)
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)


def map_samples(function: Callable, args: tuple, kwargs: dict) -> object:
    """Call `function(*args, **kwargs)` once, under vmap, for all samples.

    Args:
        function: a function of one sample that returns any nest of tensors and other values.
        args, kwargs: nests with the arguments. Every sample gets its own value of a `MappedArgument`, and everything
            else as it is.

    Returns:
        The nest, with the samples along dimension 0 of its tensors.
    """
    mapped = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, MappedArgument))
    with each_sample(len(mapped.samples)) as samples:
        args, kwargs = samples.arguments(args, kwargs)
        return samples.results(function(*args, **kwargs))


def loop_samples(function: Callable, args: tuple, kwargs: dict) -> object:
    """Return what `map_samples` returns, by a call of `function` for each sample.

    Raises:
        UnequalSamples: if results of samples differ in their structure, in shapes, or in values other than tensors.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, MappedArgument)]
    # Each sample has memory of its own, since the function may change it in place.
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
            raise UnequalSamples("its results have another structure for one sample than for another")
        if not all(map(_is_equal, kinds[0], kinds[-1])):
            raise UnequalSamples(f"it gives {kinds[0]} for one sample and {kinds[-1]} for another")
    joined = map(torch.stack, zip(*outputs, strict=True))
    return pytree.tree_unflatten([next(joined) if isinstance(x, Tensor) else x for x in results], structure)


def _is_equal(a: object, b: object) -> bool:
    """Whether two values other than tensors are the same; NaN is the same as NaN."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return a is b or (type(a) is type(b) and (a == b) is True)


def _each(samples: Tensor) -> Iterable[Tensor]:
    return samples.unbind() if samples.layout == torch.strided else samples
