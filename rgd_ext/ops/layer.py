"""The per-sample gradients of several small layers at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .library import LIBRARY, register_default, register_fake

LIBRARY.define(
    "layer_grads(str[] kinds, Tensor[] output_grads, Tensor[] inputs, int[] groups, float[] eps, bool[] biases)"
    " -> Tensor"
)


@register_fake("layer_grads")
def _(
    kinds: list[str],
    output_grads: list[Tensor],
    inputs: list[Tensor],
    groups: list[int],
    eps: list[float],
    biases: list[bool],
) -> Tensor:
    columns = 0
    for kind, e, x, bias in zip(kinds, output_grads, inputs, biases, strict=True):
        outputs = e.shape[1 if kind == "group_norm" else -1]
        columns += outputs * ((x.shape[-1] if kind == "linear" else 1) + bias)
    return inputs[0].new_empty(inputs[0].shape[0], columns)


@register_default("layer_grads")
def default_layer_grads(
    kinds: list[str],
    output_grads: list[Tensor],
    inputs: list[Tensor],
    groups: list[int],
    eps: list[float],
    biases: list[bool],
) -> Tensor:
    """Side by side, (B, D), of each layer the weight's gradients and those of the bias, if it has one."""
    columns = []
    for kind, e, x, number, epsilon, bias in zip(kinds, output_grads, inputs, groups, eps, biases, strict=True):
        pair = _weight_and_bias_grads(kind, e, x, number, epsilon)
        columns += [gradient.flatten(1) for gradient in pair[: 1 + bias]]
    return torch.cat(columns, 1)


# The gradients of the weight and of the bias, by the kind of layer; csrc/cpu/layer_grads.cpp has the same kinds.
_KINDS: dict[str, Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "linear": lambda e, x, groups, eps: (e.mT @ x, e.sum(1)),  # (B, m, n) and (B, m)
    "layer_norm": lambda e, x, groups, eps: torch.ops.rgd_ext.layer_norm_grads(e, x, eps, True),
    "rms_norm": lambda e, x, groups, eps: torch.ops.rgd_ext.layer_norm_grads(e, x, eps, False),
    "group_norm": lambda e, x, groups, eps: torch.ops.rgd_ext.group_norm_grads(e, x, groups, eps),
}


def _weight_and_bias_grads(kind: str, output_grad: Tensor, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    if kind not in _KINDS:
        *others, last = _KINDS
        raise ValueError(f"kind is {kind}: choose {', '.join(others)} or {last}")
    return _KINDS[kind](output_grad, x, groups, eps)
