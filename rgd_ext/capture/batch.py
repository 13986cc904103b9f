"""Which dimension of a tensor holds the samples of the batch, decided from its shape or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.utils import _pytree as pytree

_MARK = "_rgd_ext_batch_dim"
NESTED = (
    "a nested tensor, of which the capture cannot take samples: pass a padded one,"
    " torch.nested.to_padded_tensor(x, 0.0), and a mask"
)
AS_UNIT = "capture the enclosing module as one unit with rgd_ext.register_rule(enclosing, rgd_ext.unit)"
# A last remedy, for everything.
ONE_AT_A_TIME = (
    "capture the model with rgd_ext.precondition(model, batch_dim=None), which takes every call for one sample, and"
    " call it with one sample at a time, with a backward() for each inside `with handle.accumulate():`"
)
LISTED = (
    "The first tensor among the model's arguments is one of a list. If that has a tensor for each sample, stack them"
    f" into one, (B, ...); or {ONE_AT_A_TIME}"
)
# For models that take time first.
ELSEWHERE = (
    "If the samples lie along another dimension of the model's own input, say so where it is captured:"
    " rgd_ext.precondition(model, batch_dim=1)"
)


def mark(module: nn.Module, batch_dim: int | None) -> None:
    """Say where the samples are in the inputs of a module, where shapes alone cannot tell.

    Args:
        module: a module with parameters inside a model to be captured; the mark stays on it, copies included.
        batch_dim: the dimension of the samples in the module's inputs and output, or None where the inputs are the
            same for all samples (positions, for example).

    Raises:
        TypeError: if `module` is not a module or `batch_dim` is neither an int nor None.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: pass a torch.nn.Module")
    if batch_dim is not None and (not isinstance(batch_dim, int) or isinstance(batch_dim, bool)):
        raise TypeError(f"batch_dim is {batch_dim!r}: pass an int, or None for inputs shared by all samples")
    setattr(module, _MARK, batch_dim)


def mark_of(module: nn.Module, default: int | None) -> int | None:
    """The `batch_dim` that `module` was marked with, or `default`."""
    return module.__dict__.get(_MARK, default)


def is_marked(module: nn.Module) -> bool:
    """Whether `mark` was called for `module`."""
    return _MARK in module.__dict__


def holds_fields(leaf: object) -> bool:
    """Whether `leaf` is a dataclass or a namespace."""
    return (is_dataclass(leaf) and not isinstance(leaf, type)) or isinstance(leaf, SimpleNamespace)


def tensors_in(tree: object) -> list[Tensor]:
    """The tensors among the leaves of nested tuples, lists, mappings, dataclasses and namespaces."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_in(list(leaf.values()))
        elif holds_fields(leaf):
            found += tensors_in(list(vars(leaf).values()))
    return found


def arrays_in(args: tuple, kwargs: dict) -> Sequence[Tensor]:
    """The tensors with dimensions among the arguments of a call."""
    # One tensor, nearly always, needs no search.
    found = args if len(args) == 1 and type(args[0]) is Tensor and not kwargs else tensors_in((args, kwargs))
    return [t for t in found if t.ndim > 0]


def modules_in(model: nn.Module) -> list[nn.Module]:
    """Those of `model.modules()`, at a fraction of its price."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def is_list(args: tuple, kwargs: dict) -> bool:
    """Whether the first argument is a list of several tensors of as many dimensions."""
    first = next(iter((*args, *kwargs.values())), None)
    if not isinstance(first, (list, tuple)) or len(first) < 2 or not all(isinstance(x, Tensor) for x in first):
        return False
    return len({x.ndim for x in first}) == 1


def batch_size(arrays: Sequence[Tensor], dim: int | None) -> int | None:
    """The number of samples along `dim` of the first of `arrays`, or None without any; one if `dim` is None.

    Raises:
        ValueError: if it has too few dimensions.
        TypeError: if it is a nested tensor without a shape.
    """
    if dim is None:
        return 1
    if not arrays:
        return None
    if arrays[0].is_nested and arrays[0].layout == torch.strided:
        raise TypeError(f"the first tensor among the model's arguments is {NESTED}")
    if arrays[0].ndim <= dim:
        raise ValueError(
            f"the first tensor among the model's arguments has shape {tuple(arrays[0].shape)}, and batch_dim={dim} says"
            f" that its samples lie along dimension {dim}: pass the tensor that has them first, or capture the model"
            " with another batch_dim"
        )
    return arrays[0].shape[dim]


def check_not_empty(size: int, name: str) -> None:
    """Raise ValueError if module `name` was called with no samples."""
    if size == 0:
        raise ValueError(f"empty batch: '{name}' ran with no samples; RGD needs at least one")


@dataclass(frozen=True)
class Batch:
    """One call of a captured model.

    Attributes:
        size: B, or None where no tensor came in.
        inputs: the storages of the model's inputs, and their sizes up to dimension `at`.
        model: the model, whose buffers hold no samples.
        at: the dimension of the samples in its inputs. Tensors inside have them there, or along dimension 0. None where
            all there is belongs to one sample.
        is_listed: whether the first of the inputs is one of a list.
    """

    size: int | None
    inputs: frozenset[tuple[int, tuple[int, ...]]] = frozenset()
    model: nn.Module | None = None
    at: int | None = 0
    is_listed: bool = False

    @classmethod
    def among(
        cls,
        arrays: Sequence[Tensor],
        model: nn.Module | None = None,
        at: int | None = 0,
        is_listed: bool = False,
    ) -> Batch:
        """The batch along dimension `at` of the first of `arrays`, a model's inputs."""
        size = batch_size(arrays, at)
        if at is None:
            return cls(size, model=model, at=at)
        inputs = frozenset((storage(t), tuple(t.shape[: at + 1])) for t in arrays)
        return cls(size, inputs, model, at, is_listed)

    def place(self, x: Tensor, sample_ndim: int = 0, at: int | None = None) -> int | None:
        """The dimension of `x` with B places, before the last `sample_ndim`: `at`, or else 0; None if neither has."""
        for dim in (self.at if at is None else at, 0):
            if dim < x.ndim - sample_ndim and x.shape[dim] == self.size:
                return dim
        return None

    @cached_property
    def _constants(self) -> set[int]:
        modules = [] if self.model is None else modules_in(self.model)
        return {storage(b) for module in modules for b in module._buffers.values() if b is not None}

    def is_input(self, x: Tensor) -> bool:
        """Whether `x` is an input of the model with B samples, or a view of one."""
        found, at = storage(x), self.at or 0
        return any(address == found and self.size in (sizes[0], *sizes[at:]) for address, sizes in self.inputs)

    def is_given(self, x: Tensor) -> bool:
        """Whether `x` is any input of the model, or a view of one."""
        address = storage(x)
        return any(address == other for other, _ in self.inputs)

    def is_constant(self, x: Tensor) -> bool:
        """Whether `x` is a buffer of the model, or a view of one, and not an input."""
        return not x.requires_grad and not self.is_input(x) and storage(x) in self._constants

    def is_square(self, x: Tensor) -> bool:
        """Whether `x` was made inside, and its shape fits a batch as well as positions: (B,) indices or (B, B, ...)."""
        if x.requires_grad or self.is_input(x) or self.size == 1:
            return False
        return not x.dtype.is_floating_point if x.ndim == 1 else x.shape[0] == x.shape[1] == self.size

    def dim(
        self,
        x: Tensor,
        module: nn.Module,
        name: str,
        sample_ndim: int,
        is_side: bool = False,
        at: int | None = None,
    ) -> int | None:
        """The dimension of the samples in an input of `module`, or None where all samples share it.

        A side input (a mask, a table) is suspected of being square by chance even if it holds floats. Modules whose
        inputs have the samples elsewhere than the model's pass `at`.

        Raises:
            ValueError: where the shape does not tell, naming the module and the way to mark it.
            TypeError: for a nested tensor.
        """
        if is_marked(module):
            return module.__dict__[_MARK]
        if x.is_nested:
            raise TypeError(f"module '{name}' got {NESTED}")
        at = self.at if at is None else at
        place = self.place(x, sample_ndim, at)
        if x.requires_grad and place is not None:
            return place  # nearly always
        if self.is_constant(x):
            return None
        if self.size is None:
            return at if at < x.ndim - sample_ndim else 0
        is_sample, is_index = x.ndim <= sample_ndim, not x.dtype.is_floating_point
        if place is not None:
            if (is_index or is_side) and self.is_square(x):
                raise ValueError(self._ambiguous(x, name))
            return place
        if x.requires_grad or self.is_input(x) or not (is_sample or 1 in x.shape[: at + 1] or is_index):
            raise ValueError(self._ambiguous(x, name))
        return None

    def size_of(self, x: Tensor, dim: int, name: str) -> int:
        """The number of samples along `dim` of an input of module `name`; ValueError if the model got another one."""
        size = x.shape[dim]
        if self.size is not None and size != self.size:
            raise ValueError(
                f"batch sizes disagree: module '{name}' got {size} samples along dimension {dim} of an input of"
                f" shape {tuple(x.shape)}, but the model was called with {self.size}. {self._others}"
            )
        return size

    def _ambiguous(self, x: Tensor, name: str) -> str:
        return (
            f"module '{name}' got an input of shape {tuple(x.shape)} in a batch of {self.size} samples, which does not"
            " tell the dimension of the samples. If the input is the same for all samples, give it a leading dimension"
            " of 1 or call rgd_ext.mark(module, batch_dim=None); if the samples are along another dimension (as with"
            " batch_first=False), keep them along dimension 0 or call rgd_ext.mark(module, batch_dim=...); if they are"
            f" merged with another dimension, keep the two apart or {AS_UNIT}; if there are not so many samples, call"
            " the model by keywords, and first one with a tensor that has them along dimension 0."
            f" {self._others}"
        )

    @property
    def _others(self) -> str:
        """Remedies where it is not the module that is to blame."""
        if self.is_listed:
            return LISTED
        last = f"As a last remedy, {ONE_AT_A_TIME}"
        return last if self.at else f"{ELSEWHERE}. {last}"


def storage(x: Tensor) -> int:
    """The address of the memory of `x` and of its views."""
    if x.layout == torch.strided and not _functorch.is_functorch_wrapped_tensor(x):
        return x.untyped_storage().data_ptr()
    return id(x)  # sparse tensors have several and no views; those of transforms show none
