"""Layer rules: a layer's inputs and output gradients -> its parameters' per-sample contributions.

A rule is called as rule(module, inputs, output_grad) with the batch in front, in the dtype of the parameters. It
returns, by parameter name, h_i = (d output_i / d parameter)^T output_grad_i: a (B, *shape) tensor, or a factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import Geometry, accumulate_dtype
from .convolution import Convolution
from .embedding import Rows
from .factors import Bias, Factor, Outer

Rule: TypeAlias = Callable[[nn.Module, tuple[Tensor, ...], Tensor], dict[str, Tensor | Factor]]


@dataclass(frozen=True)
class Registered:
    """A rule and the least number of dimensions one sample of the module's input has.

    `at` is the dimension of the samples, where the layer's own definition says.
    """

    rule: Rule
    sample_ndim: int | Callable[[nn.Module], int] = 0
    at: int | None = None

    def minimum(self, module: nn.Module) -> int:
        """Dimensions of one sample of the input of `module`."""
        return self.sample_ndim(module) if callable(self.sample_ndim) else self.sample_ndim


_registry: dict[type[nn.Module], Registered] = {}
# Of modules that are units by themselves.
_UNIT = "_rgd_ext_unit"


def unit(module: nn.Module, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """The rule that captures a module and all it contains as one function, under `torch.func.vmap`.

    Pass it to `register_rule` for modules whose parameters no finer rule can follow. It is what modules without a
    rule and without children get by default. The module sees one sample at a time, as a batch of one.
    """
    raise RuntimeError("rgd_ext.unit is a marker for register_rule; it is not called")


def register_rule(module_type: type[nn.Module] | nn.Module, rule: Rule) -> None:
    """Teach the capture a layer.

    Args:
        module_type: the rule serves modules of this type, and of subclasses that don't override `forward`. The module
            is captured with all it contains; models captured before are not affected. With `rgd_ext.unit`, a module
            stands for itself and its copies.
        rule: called in the backward as `rule(module, inputs, output_grad)`, where `inputs` are the tensors the module
            was called with and `output_grad` is the gradient of its (only) output, batch first. Returns a dict from
            the name of every trainable parameter to its per-sample contributions, a (B, *param.shape) tensor:
            sample i's term of the parameter's ordinary gradient, so that their sum over i is that gradient. Or
            `rgd_ext.unit`: the module is run under `torch.func.vmap`, with nothing to derive by hand.

    Raises:
        TypeError: if `module_type` is not a module type, or a module for another rule than `rgd_ext.unit`; or if
            `rule` is not callable.

    Example:
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = torch.nn.Parameter(torch.ones(3))
        ...
        ...     def forward(self, x):
        ...         return x * self.gain
        >>> rgd_ext.register_rule(Scale, lambda module, inputs, output_grad: {"gain": inputs[0] * output_grad})
    """
    if isinstance(module_type, nn.Module) and rule is unit:
        setattr(module_type, _UNIT, True)
        return
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(
            f"module_type is {module_type!r}: pass a subclass of torch.nn.Module, or a module with rgd_ext.unit"
        )
    if not callable(rule):
        raise TypeError(f"rule is {rule!r}: pass a callable (module, inputs, output_grad) -> dict, or rgd_ext.unit")
    _registry[module_type] = Registered(rule)


def rule_for(module: nn.Module) -> Registered | None:
    """The rule that serves `module`, or None: a subclass with its own `forward` computes something else."""
    if _UNIT in module.__dict__:
        return Registered(unit)
    for ancestor in type(module).__mro__:
        if ancestor in _registry:
            return _registry[ancestor] if type(module).forward is ancestor.forward else None
    return None


def linear(module: nn.Module, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y = x W^T + b over any leading dimensions: dW_i = sum_t e_it x_it^T, db_i = sum_t e_it."""
    return outer(inputs[0], output_grad, "weight", "bias")


def outer(x: Tensor, output_grad: Tensor, weight: str, bias: str) -> dict[str, Tensor | Factor]:
    """`linear` under other names, for layers made of several products."""
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


def embedding(module: nn.Embedding, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """Row x_it of the table gets e_it, except for padding."""
    indices = inputs[0].reshape(inputs[0].shape[0], -1).long()  # products with B do not fit int32
    output_grad = output_grad.reshape(*indices.shape, -1)
    if module.padding_idx is not None:
        output_grad = output_grad.masked_fill((indices == module.padding_idx)[..., None], 0)
    if module.scale_grad_by_freq:
        # bincount would make the host wait for the largest index. Integer sums do not depend on the order of atomics.
        ones = torch.ones_like(indices).flatten()
        counts = ones.new_zeros(module.num_embeddings).index_add_(0, indices.flatten(), ones)
        output_grad = output_grad / counts[indices][..., None]
    return {"weight": Rows.of_sequences(indices, output_grad, module.weight.shape, module.sparse)}


def convolution(module: nn.Module, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """dW_i is the weight gradient of sample i's own convolution."""
    x, padding = inputs[0], module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * (x.ndim - 2)
    contributions = {}
    if module.weight.requires_grad:  # frozen weights are common, and theirs is the cost
        contributions["weight"] = _convolution(module, output_grad, x, padding)
    if module.bias is not None:
        contributions["bias"] = _over_space(output_grad)
    return contributions


def transposed_convolution(
    module: nn.Module, inputs: tuple[Tensor, ...], output_grad: Tensor
) -> dict[str, Tensor | Factor]:
    """The adjoint of a convolution: input and output gradient change places."""
    contributions = {}
    if module.weight.requires_grad:
        contributions["weight"] = _convolution(module, inputs[0], output_grad, module.padding)
    if module.bias is not None:
        contributions["bias"] = _over_space(output_grad)
    return contributions


def _convolution(module: nn.Module, output_grad: Tensor, x: Tensor, padding: tuple[int, ...]) -> Convolution:
    geometry = Geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
    return Convolution(output_grad, x, module.weight.shape, geometry)


def layer_norm(module: nn.LayerNorm, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y = x^ w + b over the trailing dimensions, x^ the normalised input."""
    return _layer_norm(inputs[0], output_grad, module.normalized_shape, module.eps, centred=True)


def rms_norm(module: nn.RMSNorm, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y = x^ w over the trailing dimensions."""
    return _layer_norm(inputs[0], output_grad, module.normalized_shape, _rms_eps(module, inputs[0]), centred=False)


def _rms_eps(module: nn.RMSNorm, x: Tensor) -> float:
    return torch.finfo(accumulate_dtype(x.dtype)).eps if module.eps is None else module.eps


def _layer_norm(
    x: Tensor, output_grad: Tensor, shape: tuple[int, ...], eps: float, *, centred: bool
) -> dict[str, Tensor | Factor]:
    if len(shape) > 1:
        x, output_grad = x.flatten(-len(shape)), output_grad.flatten(-len(shape))
    weight, bias = torch.ops.rgd_ext.layer_norm_grads(output_grad, x, eps, centred)
    if len(shape) > 1:
        weight, bias = weight.unflatten(1, shape), bias.unflatten(1, shape)
    return {"weight": weight, "bias": bias}


def group_norm(module: nn.GroupNorm, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y = x^ w + b per channel."""
    return _group_norm(inputs[0], output_grad, module.num_groups, module.eps)


def _group_norm(x: Tensor, output_grad: Tensor, groups: int, eps: float) -> dict[str, Tensor | Factor]:
    return dict(zip(("weight", "bias"), torch.ops.rgd_ext.group_norm_grads(output_grad, x, groups, eps), strict=True))


def instance_norm(module: nn.Module, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y = x^ w + b per channel, x^ by the sample's own or by the running statistics."""
    if module.training or not module.track_running_stats:
        return _group_norm(inputs[0], output_grad, module.num_features, module.eps)
    statistics = module.running_mean, module.running_var
    normalised = F.instance_norm(inputs[0], *statistics, use_input_stats=False, eps=module.eps)
    return _per_channel(normalised, output_grad)


def batch_norm(module: nn.Module, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y = x^ w + b per channel; in training mode x^ is by the batch's statistics, which belong to the layer."""
    if module.training or module.running_mean is None:
        normalised = F.batch_norm(inputs[0], None, None, training=True, eps=module.eps)
    else:
        normalised = F.batch_norm(inputs[0], module.running_mean, module.running_var, eps=module.eps)
    return _per_channel(normalised, output_grad)


def _per_channel(normalised: Tensor, output_grad: Tensor) -> dict[str, Tensor | Factor]:
    if normalised.ndim == 2:
        return {"weight": normalised * output_grad, "bias": output_grad}
    return {"weight": _over_space(normalised * output_grad), "bias": _over_space(output_grad)}


def _over_space(x: Tensor) -> Tensor:
    """The sum of (B, m, *space) over space, (B, m)."""
    return x.sum(tuple(range(2, x.ndim)))


# What `layer_grads` calls the layers it serves, by the id of their rule, since those of users may have no hash.
KINDS: dict[int, str] = {
    id(linear): "linear",
    id(layer_norm): "layer_norm",
    id(rms_norm): "rms_norm",
    id(group_norm): "group_norm",
}


_registry |= {
    nn.Linear: Registered(linear, 1),
    nn.Bilinear: Registered(bilinear, 1),
    nn.Embedding: Registered(embedding),
    nn.Conv1d: Registered(convolution, 2),
    nn.Conv2d: Registered(convolution, 3),
    nn.Conv3d: Registered(convolution, 4),
    nn.ConvTranspose1d: Registered(transposed_convolution, 2),
    nn.ConvTranspose2d: Registered(transposed_convolution, 3),
    nn.ConvTranspose3d: Registered(transposed_convolution, 4),
    nn.LayerNorm: Registered(layer_norm, lambda module: len(module.normalized_shape)),
    nn.RMSNorm: Registered(rms_norm, lambda module: len(module.normalized_shape)),
    nn.GroupNorm: Registered(group_norm, 1, at=0),
    nn.InstanceNorm1d: Registered(instance_norm, 2),
    nn.InstanceNorm2d: Registered(instance_norm, 3),
    nn.InstanceNorm3d: Registered(instance_norm, 4),
    nn.BatchNorm1d: Registered(batch_norm, 1, at=0),
    nn.BatchNorm2d: Registered(batch_norm, 3),
    nn.BatchNorm3d: Registered(batch_norm, 4),
}
