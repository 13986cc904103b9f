"""The batch of a call, and which dimension of a tensor holds its samples: decided from the shape, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch

from ..nests import modules_in
from .marks import is_marked, mark_of

NESTED = (
    "a nested tensor, of which the capture cannot take samples: pass a padded one,"
    " torch.nested.to_padded_tensor(x, 0.0), and a mask"
)
AS_UNIT = "capture the enclosing module as one unit with rgd_ext.register_rule(enclosing, rgd_ext.unit)"
# The last remedy, which works for every model.
ONE_AT_A_TIME = (
    "capture the model with rgd_ext.precondition(model, batch_dim=None), which takes every call for one sample, and"
    " call it with one sample at a time, with a backward() for each inside `with handle.accumulate():`"
)
LISTED = (
    "The first tensor among the model's arguments is one of a list. If that has a tensor for each sample, stack them"
    f" into one, (B, ...); or {ONE_AT_A_TIME}"
)
# The remedy for models that take time first.
ELSEWHERE = (
    "If the samples lie along another dimension of the model's own input, say so where it is captured:"
    " rgd_ext.precondition(model, batch_dim=1)"
)


def is_list(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
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
        size: B, or None if the model was called without a tensor.
        inputs: for each of the model's inputs, its storage and its sizes up to dimension `batch_dim`.
        model: the model, whose buffers hold no samples.
        batch_dim: the dimension of the samples in the model's inputs. Tensors inside of the model have them there, or
            along dimension 0. None if the call is for one sample, whatever its tensors are.
        is_listed: whether the first of the inputs is one of a list.
    """

    size: int | None
    inputs: frozenset[tuple[int, tuple[int, ...]]] = frozenset()
    model: nn.Module | None = None
    batch_dim: int | None = 0
    is_listed: bool = False

    @classmethod
    def among(
        cls,
        arrays: Sequence[Tensor],
        model: nn.Module | None = None,
        batch_dim: int | None = 0,
        is_listed: bool = False,
    ) -> Batch:
        """The batch along dimension `batch_dim` of the first of `arrays`, a model's inputs."""
        size = batch_size(arrays, batch_dim)
        if batch_dim is None:
            return cls(size, model=model, batch_dim=None)
        inputs = frozenset((storage(t), tuple(t.shape[: batch_dim + 1])) for t in arrays)
        return cls(size, inputs, model, batch_dim, is_listed)

    def matching_dim(self, x: Tensor, sample_ndim: int = 0, batch_dim: int | None = None) -> int | None:
        """The dimension of `x` that has size B: `batch_dim`, or else 0; None if neither has.

        The last `sample_ndim` dimensions are those of one sample, and not considered.
        """
        for dim in ((self.batch_dim or 0) if batch_dim is None else batch_dim, 0):
            if dim < x.ndim - sample_ndim and x.shape[dim] == self.size:
                return dim
        return None

    @cached_property
    def _constants(self) -> set[int]:
        modules = [] if self.model is None else modules_in(self.model)
        return {storage(b) for module in modules for b in module._buffers.values() if b is not None}

    def is_batched_input(self, x: Tensor) -> bool:
        """Whether `x` is an input of the model with B samples, or a view of one."""
        found, dim = storage(x), self.batch_dim or 0
        return any(address == found and self.size in (sizes[0], *sizes[dim:]) for address, sizes in self.inputs)

    def is_input(self, x: Tensor) -> bool:
        """Whether `x` is any input of the model, or a view of one."""
        address = storage(x)
        return any(address == other for other, _ in self.inputs)

    def is_constant(self, x: Tensor) -> bool:
        """Whether `x` is a buffer of the model, or a view of one, and not an input."""
        return not x.requires_grad and not self.is_batched_input(x) and storage(x) in self._constants

    def may_be_positions(self, x: Tensor) -> bool:
        """Whether the model made `x` itself, in a shape that fits positions as well as samples.

        Such shapes are (B,) for indices, and (B, B, ...).
        """
        if x.requires_grad or self.is_batched_input(x) or self.size == 1:
            return False
        return not x.dtype.is_floating_point if x.ndim == 1 else x.shape[0] == x.shape[1] == self.size

    def dim(
        self,
        x: Tensor,
        module: nn.Module,
        name: str,
        sample_ndim: int,
        is_side: bool = False,
        batch_dim: int | None = None,
    ) -> int | None:
        """The dimension of the samples in an input of a module, or None where all samples share it.

        Args:
            x: the input.
            module, name: the module and its name.
            sample_ndim: the least number of dimensions of one sample.
            is_side: whether it is a side input, such as a mask or a table. Those are refused in the shape (B, B, ...)
                even if they hold floats.
            batch_dim: the dimension of the samples, where the module has them elsewhere than the model.

        Raises:
            ValueError: where the shape does not tell, naming the module and the way to mark it.
            TypeError: for a nested tensor.
        """
        if is_marked(module):
            return mark_of(module, None)
        if x.is_nested:
            raise TypeError(f"module '{name}' got {NESTED}")
        batch_dim = (self.batch_dim or 0) if batch_dim is None else batch_dim
        matching = self.matching_dim(x, sample_ndim, batch_dim)
        if x.requires_grad and matching is not None:
            return matching  # nearly always
        if self.is_constant(x):
            return None
        if self.size is None:
            return batch_dim if batch_dim < x.ndim - sample_ndim else 0
        is_sample, is_index = x.ndim <= sample_ndim, not x.dtype.is_floating_point
        if matching is not None:
            if (is_index or is_side) and self.may_be_positions(x):
                raise ValueError(self._ambiguous(x, name))
            return matching
        if x.requires_grad or self.is_batched_input(x) or not (is_sample or 1 in x.shape[: batch_dim + 1] or is_index):
            raise ValueError(self._ambiguous(x, name))
        return None

    def checked_size(self, x: Tensor, dim: int, name: str) -> int:
        """The number of samples along `dim` of an input of module `name`.

        Raises:
            ValueError: if the model was called with another number of samples.
        """
        size = x.shape[dim]
        if self.size is not None and size != self.size:
            raise ValueError(
                f"batch sizes disagree: module '{name}' got {size} samples along dimension {dim} of an input of"
                f" shape {tuple(x.shape)}, but the model was called with {self.size}. {self._other_remedies}"
            )
        return size

    def _ambiguous(self, x: Tensor, name: str) -> str:
        """The message for an input whose shape does not tell where the samples are."""
        return (
            f"module '{name}' got an input of shape {tuple(x.shape)} in a batch of {self.size} samples, which does not"
            " tell the dimension of the samples. If the input is the same for all samples, give it a leading dimension"
            " of 1 or call rgd_ext.mark(module, batch_dim=None); if the samples are along another dimension (as with"
            " batch_first=False), keep them along dimension 0 or call rgd_ext.mark(module, batch_dim=...); if they are"
            f" merged with another dimension, keep the two apart or {AS_UNIT}; if there are not so many samples, call"
            " the model by keywords, and first one with a tensor that has them along dimension 0."
            f" {self._other_remedies}"
        )

    @property
    def _other_remedies(self) -> str:
        """The remedies for models whose own inputs have the samples elsewhere."""
        if self.is_listed:
            return LISTED
        last = f"As a last remedy, {ONE_AT_A_TIME}"
        return last if self.batch_dim else f"{ELSEWHERE}. {last}"


def storage(x: Tensor) -> int:
    """The address of the memory of `x` and of its views."""
    if x.layout == torch.strided and not _functorch.is_functorch_wrapped_tensor(x):
        return x.untyped_storage().data_ptr()
    return id(x)  # sparse tensors have several storages and no views; tensors of transforms show no storage
