"""Operators on the gradients of linear layers with one vector per sample, which are never formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import accumulate_dtype, as_matrix, product_with_wider
from .checks import Tensors, as_list, check_weights, checked_grads
from .library import LIBRARY, register_default, register_fake
from .results import empty_gramian

LIBRARY.define("ghost_gram(Tensor[] inputs, Tensor[] output_grads, bool[] biases) -> Tensor")


@register_fake("ghost_gram")
def _(inputs: list[Tensor], output_grads: list[Tensor], biases: list[bool]) -> Tensor:
    return empty_gramian(output_grads[0])


@register_default("ghost_gram")
def default_ghost_gram(inputs: list[Tensor], output_grads: list[Tensor], biases: list[bool]) -> Tensor:
    """K = sum_l (A_l A_l^T + bias_l) o (E_l E_l^T), (B, B), exactly symmetric."""
    layers = zip(map(as_matrix, inputs), map(as_matrix, output_grads), biases, strict=True)
    product = torch.stack([(a @ a.T + bias) * (e @ e.T) for a, e, bias in layers]).sum(0)
    return (product + product.T) / 2


def ghost_gram(inputs: Tensors, output_grads: Tensors, biases: Sequence[bool]) -> Tensor:
    """Gramian of linear layers y = W x + b without their gradients, K = sum_l (A_l A_l^T + bias_l) o (E_l E_l^T).

    Sample i's gradient of a weight is the outer product of its rows in E_l and A_l, that of a bias its row in E_l.

    Args:
        inputs: A_l, (B, n_l), the inputs of each layer. With n_l = 0 only the bias counts.
        output_grads: E_l, (B, m_l), the gradients of its outputs.
        biases: whether the layer has a bias.

    Returns:
        K of shape (B, B) in the accumulation dtype, exactly symmetric.

    Raises:
        ValueError, TypeError: as `moments`; ValueError if the three disagree in number or a tensor is not a matrix.
    """
    return torch.ops.rgd_ext.ghost_gram(*_checked_layers(inputs, output_grads, biases), biases)


LIBRARY.define("ghost_combine(Tensor[] inputs, Tensor[] output_grads, bool[] biases, Tensor weights) -> Tensor[]")


@register_fake("ghost_combine")
def _(inputs: list[Tensor], output_grads: list[Tensor], biases: list[bool], weights: Tensor) -> list[Tensor]:
    results = []
    for a, e, bias in zip(inputs, output_grads, biases, strict=True):
        results += [e.new_empty(e.shape[1])] * bias + [e.new_empty(e.shape[1], a.shape[1])] * (a.shape[1] > 0)
    return results


@register_default("ghost_combine")
def default_ghost_combine(
    inputs: list[Tensor], output_grads: list[Tensor], biases: list[bool], weights: Tensor
) -> list[Tensor]:
    """For each layer sum_i w_i e_i if it has a bias, and sum_i w_i e_i a_i^T if it has inputs."""
    results = []
    for a, e, bias in zip(inputs, output_grads, biases, strict=True):
        column = weights[:, None].to(accumulate_dtype(e.dtype))
        results += [(e * column).sum(0).to(e.dtype)] if bias else []
        results += [product_with_wider(e.T, a * column).to(e.dtype)] if a.shape[1] else []
    return results


def ghost_combine(inputs: Tensors, output_grads: Tensors, biases: Sequence[bool], weights: Tensor) -> list[Tensor]:
    """Weighted sums over samples of the gradients of linear layers y = W x + b, which are never formed.

    Args:
        inputs, output_grads, biases: of each layer, as `ghost_gram` takes them.
        weights: w, shape (B,), on their device.

    Returns:
        For each layer sum_i w_i e_i, (m_l,), where it has a bias, and then sum_i w_i e_i a_i^T, (m_l, n_l), where n_l
        is not 0.

    Raises:
        ValueError, TypeError: as `ghost_gram`; ValueError if `weights` is not of shape (B,), holds no floats or is on
            another device.
    """
    layers = _checked_layers(inputs, output_grads, biases)
    check_weights(weights, layers[1][0])
    if not weights.is_floating_point():
        raise ValueError(f"weights has dtype {weights.dtype}: convert it to a floating-point one")
    return torch.ops.rgd_ext.ghost_combine(*layers, biases, weights)


def _checked_layers(
    inputs: Tensors, output_grads: Tensors, biases: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    left, right = as_list(inputs), as_list(output_grads)
    tensors = checked_grads(left + right)
    if not len(left) == len(right) == len(biases):
        raise ValueError(
            f"got {len(left)} inputs, {len(right)} output gradients and {len(biases)} biases: pass one of each per"
            " layer"
        )
    for tensor in tensors:
        if tensor.ndim != 2:
            raise ValueError(f"a layer has a tensor of shape {tuple(tensor.shape)}: pass matrices (B, n) and (B, m)")
    return left, right
