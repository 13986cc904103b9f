"""The rules of linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contributions.factor import Factor
from ..contributions.outer import Bias, Outer
from .spec import LINEAR, LayerSpec


def linear(module: nn.Module, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y = x W^T + b over any leading dimensions: dW_i = sum_t e_it x_it^T, db_i = sum_t e_it."""
    return outer(inputs[0], output_grad, "weight", "bias")


def linear_spec(module: nn.Module) -> LayerSpec:
    """The spec of a linear layer."""
    return LINEAR


def outer(x: Tensor, output_grad: Tensor, weight: str, bias: str) -> dict[str, Tensor | Factor]:
    """The rule `linear` for parameters with other names, in layers that consist of several products."""
    if x.ndim > 3:
        x, output_grad = x.flatten(1, -2), output_grad.flatten(1, -2)
    factor = Outer(x, output_grad, torch.Size((output_grad.shape[-1], x.shape[-1])))
    return {weight: factor, bias: Bias(factor)}


def bilinear(module: nn.Bilinear, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y_k = u^T W_k v + b_k: dW_i = sum_t e_it (x) (u_it (x) v_it)."""
    left, right, output_grad = _sequences(inputs[0]), _sequences(inputs[1]), _sequences(output_grad)
    products = (left[..., :, None] * right[..., None, :]).flatten(2)
    factor = Outer(products, output_grad, module.weight.shape)
    return {"weight": factor, "bias": Bias(factor)}


def _sequences(x: Tensor) -> Tensor:
    """(B, ..., n) as (B, T, n)."""
    return x if x.ndim == 3 else x.flatten(1, -2) if x.ndim > 3 else x.unsqueeze(1)
