"""The rules of normalisation layers. The normalised input is written x^."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contributions.factor import Factor
from ..linalg import accumulate_dtype
from .spec import LayerSpec


def layer_norm(module: nn.LayerNorm, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y = x^ w + b over the trailing dimensions."""
    return _over_trailing(inputs[0], output_grad, module.normalized_shape, module.eps, centred=True)


def layer_norm_spec(module: nn.LayerNorm) -> LayerSpec | None:
    """The spec of a layer norm over one dimension."""
    return LayerSpec("layer_norm", eps=module.eps) if len(module.normalized_shape) == 1 else None


def rms_norm(module: nn.RMSNorm, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """y = x^ w over the trailing dimensions."""
    eps = _rms_eps(module, inputs[0].dtype)
    return _over_trailing(inputs[0], output_grad, module.normalized_shape, eps, centred=False)


def rms_norm_spec(module: nn.RMSNorm) -> LayerSpec | None:
    """The spec of an RMS norm over one dimension."""
    if len(module.normalized_shape) != 1:
        return None
    return LayerSpec("rms_norm", eps=_rms_eps(module, module.weight.dtype))


def _rms_eps(module: nn.RMSNorm, dtype: torch.dtype) -> float:
    """What an RMS norm of inputs in `dtype` adds to the mean of squares."""
    return torch.finfo(accumulate_dtype(dtype)).eps if module.eps is None else module.eps


def _over_trailing(
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
    return _in_groups(inputs[0], output_grad, module.num_groups, module.eps)


def group_norm_spec(module: nn.GroupNorm) -> LayerSpec:
    """The spec of a group norm."""
    return LayerSpec("group_norm", module.num_groups, module.eps)


def _in_groups(x: Tensor, output_grad: Tensor, groups: int, eps: float) -> dict[str, Tensor | Factor]:
    weight, bias = torch.ops.rgd_ext.group_norm_grads(output_grad, x, groups, eps)
    return {"weight": weight, "bias": bias}


def instance_norm(
    module: nn.modules.instancenorm._InstanceNorm, inputs: tuple[Tensor, ...], output_grad: Tensor
) -> dict[str, Tensor | Factor]:
    """y = x^ w + b per channel, where x^ is computed with the statistics of the sample, or the running ones."""
    if module.training or not module.track_running_stats:
        return _in_groups(inputs[0], output_grad, module.num_features, module.eps)
    statistics = module.running_mean, module.running_var
    normalised = F.instance_norm(inputs[0], *statistics, use_input_stats=False, eps=module.eps)
    return _per_channel(normalised, output_grad)


def batch_norm(
    module: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...], output_grad: Tensor
) -> dict[str, Tensor | Factor]:
    """y = x^ w + b per channel, where x^ is computed with the running statistics.

    In training mode it is computed with those of the batch, which belong to the layer.
    """
    if module.training or module.running_mean is None:
        normalised = F.batch_norm(inputs[0], None, None, training=True, eps=module.eps)
    else:
        normalised = F.batch_norm(inputs[0], module.running_mean, module.running_var, eps=module.eps)
    return _per_channel(normalised, output_grad)


def _per_channel(normalised: Tensor, output_grad: Tensor) -> dict[str, Tensor | Factor]:
    space = tuple(range(2, output_grad.ndim))
    if not space:
        return {"weight": normalised * output_grad, "bias": output_grad}
    return {"weight": (normalised * output_grad).sum(space), "bias": output_grad.sum(space)}
