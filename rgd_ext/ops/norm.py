"""The per-sample gradients of the weights and biases of normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_groups, checked_grads
from .library import LIBRARY, register_default, register_fake

LIBRARY.define("group_norm_grads(Tensor output_grad, Tensor x, int groups, float eps) -> (Tensor, Tensor)")


@register_fake("group_norm_grads")
def _(output_grad: Tensor, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


@register_default("group_norm_grads")
def default_group_norm_grads(output_grad: Tensor, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """sum_t e_t x^_t and sum_t e_t per sample and channel, both (B, n), with x^ the normalised input."""
    normalised = F.group_norm(x, groups, eps=eps)
    weight, bias = (y.reshape(*y.shape[:2], -1).sum(2) for y in (normalised * output_grad, output_grad))
    return weight, bias


def group_norm_grads(output_grad: Tensor, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Per-sample gradients of the weight and bias of a group normalisation, in one read of its input.

    With x^ the normalised input: sum_t output_grad[i, c, t] x^[i, c, t] and sum_t output_grad[i, c, t].

    Args:
        output_grad, x: shape (B, n, *space), of one dtype and device.
        groups: divides n; each has one mean and variance per sample.
        eps: added to the variance.

    Returns:
        Two tensors of shape (B, n).

    Raises:
        ValueError, TypeError: as `moments`; ValueError if the shapes disagree or `groups` does not divide n.
    """
    _check_pair(output_grad, x, "(B, n, *space)")
    check_groups(groups, x.shape[1])
    return torch.ops.rgd_ext.group_norm_grads(output_grad, x, groups, eps)


LIBRARY.define("layer_norm_grads(Tensor output_grad, Tensor x, float eps, bool centred) -> (Tensor, Tensor)")


@register_fake("layer_norm_grads")
def _(output_grad: Tensor, x: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], x.shape[-1]
    return x.new_empty(shape), x.new_empty(shape)


@register_default("layer_norm_grads")
def default_layer_norm_grads(output_grad: Tensor, x: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """sum_t e_t o x^_t and sum_t e_t per sample, both (B, n), with x^ = LayerNorm(x), or RMSNorm(x) if not centred."""
    norm, places = F.layer_norm if centred else F.rms_norm, x.shape[1:-1].numel()
    products = norm(x, x.shape[-1:], eps=eps) * output_grad
    weight, bias = (t.reshape(len(x), places, x.shape[-1]).sum(1) for t in (products, output_grad))
    return weight, bias


def layer_norm_grads(output_grad: Tensor, x: Tensor, eps: float, centred: bool = True) -> tuple[Tensor, Tensor]:
    """Per-sample gradients of the weight and bias of a LayerNorm or RMSNorm, in one read of its input.

    sum_t output_grad[i, t] o x^[i, t] and sum_t output_grad[i, t], with x^ the normalised input: for each (i, t),
    x^ = (x - mean) / sqrt(variance + eps), or x^ = x / sqrt(mean(x^2) + eps) if not centred.

    Args:
        output_grad, x: shape (B, ..., n), of one dtype and device.
        eps: added to the variance.
        centred: True for LayerNorm, False for RMSNorm.

    Returns:
        Two tensors of shape (B, n).

    Raises:
        ValueError, TypeError: as `moments`; ValueError if the shapes disagree.
    """
    _check_pair(output_grad, x, "(B, ..., n)")
    return torch.ops.rgd_ext.layer_norm_grads(output_grad, x, eps, centred)


def _check_pair(output_grad: Tensor, x: Tensor, form: str) -> None:
    checked_grads([output_grad, x])
    if x.ndim < 2 or output_grad.shape != x.shape:
        raise ValueError(
            f"output_grad has shape {tuple(output_grad.shape)} and x {tuple(x.shape)}: pass two of shape {form}"
        )
