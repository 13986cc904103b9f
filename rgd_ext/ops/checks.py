"""What the public functions check of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Tensor | Sequence[Tensor]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_list(tensors: Tensors) -> list[Tensor]:
    """A list of tensors from one tensor or a sequence of them."""
    if isinstance(tensors, Tensor):
        return [tensors]
    try:
        return list(tensors)
    except TypeError as error:
        raise TypeError(f"got {tensors!r}: pass a tensor, or a sequence of tensors") from error


def checked_grads(grads: Tensors) -> list[Tensor]:
    """`grads` as a list, or an error that names what is wrong with it."""
    tensors = as_list(grads)
    if not tensors:
        raise ValueError("grads is empty: pass a (B, d) tensor or at least one (B, *shape) tensor")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"grads[{index}] is a {type(tensor).__name__}: pass tensors of shape (B, *shape)")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"grads[{index}] has dtype {tensor.dtype}: per-sample gradients are float32, float64, bfloat16 or"
                " float16; convert it first"
            )
        if tensor.ndim == 0:
            raise ValueError(f"grads[{index}] is a scalar: its first dimension must be the batch, (B, *shape)")
    first = tensors[0]
    if first.shape[0] == 0:
        raise ValueError(f"empty batch: grads[0] has shape {tuple(first.shape)}; RGD needs at least one sample")
    for index, tensor in enumerate(tensors):
        _check_same_batch(first, index, tensor)
    return tensors


def _check_same_batch(first: Tensor, index: int, tensor: Tensor) -> None:
    if tensor.shape[0] != first.shape[0]:
        raise ValueError(
            f"batch sizes disagree: grads[0] has {first.shape[0]} samples and grads[{index}] has"
            f" {tensor.shape[0]}; every tensor must be (B, *shape) with the same B"
        )
    if tensor.dtype != first.dtype:
        raise TypeError(
            f"dtypes disagree: grads[0] is {first.dtype} and grads[{index}] is {tensor.dtype}; convert them to one"
        )
    if tensor.device != first.device:
        raise ValueError(
            f"devices disagree: grads[0] is on {first.device} and grads[{index}] on {tensor.device};"
            " move them to one device"
        )


def check_weights(weights: Tensor, grad: Tensor) -> None:
    """Raise unless `weights` has one number for each sample of `grad`, on the same device."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is a {type(weights).__name__}: pass a tensor of shape (B,)")
    if weights.shape != grad.shape[:1]:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} but grads holds {grad.shape[0]} samples: pass one weight per"
            " sample"
        )
    if weights.device != grad.device:
        raise ValueError(f"weights is on {weights.device} but grads on {grad.device}: move them to one device")


def check_vector(name: str, vector: Tensor, shape: torch.Size, like: Tensor) -> None:
    """Raise unless `vector`, which the message calls `name`, has `shape`, and the dtype and the device of `like`."""
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} is a {type(vector).__name__}: pass a tensor of shape {tuple(shape)}")
    if vector.shape != shape:
        raise ValueError(f"{name} has shape {tuple(vector.shape)}: pass a tensor of shape {tuple(shape)}")
    if vector.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {vector.dtype}: convert it with .to({like.dtype})")
    if vector.device != like.device:
        raise ValueError(f"{name} is on {vector.device}: move it with .to({str(like.device)!r})")


def check_gramian(name: str, matrix: Tensor) -> None:
    """Raise unless `matrix` is (B, B) in float64 or float32; symmetry itself is taken on trust."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}: pass a symmetric (B, B) matrix")
    check_dtype(name, matrix)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is in float64 or float32."""
    if tensor.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"{name} has dtype {tensor.dtype}: convert it to float64 or float32")


def check_groups(groups: int, *channels: int) -> None:
    """Raise ValueError unless `groups` divides each number of channels."""
    if groups < 1 or any(number % groups for number in channels):
        raise ValueError(f"groups is {groups}: it must divide {' and '.join(map(str, channels))} channels")
