"""Batch normalisation, which couples the samples of a batch: how to find it, and how to replace it."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

REMEDIES = (
    "call .eval() on it for frozen statistics, replace it with rgd_ext.convert_batch_norm(model), or pass"
    " batch_norm='contribution' to take the batch's statistics as part of the layer"
)
REMEDIES_FOR_RESIDUALS = (
    "call .eval() on it for frozen statistics, or replace it with rgd_ext.convert_batch_norm(model)"
)
REMEDIES_IN_UNIT = (
    "it is part of a module captured sample by sample; call .eval() on it, replace it with"
    " rgd_ext.convert_batch_norm(model), or leave it outside of that module"
)
REMEDIES_OF_OWN_FORWARD = (
    "call .eval() on it for frozen statistics; or, since it has a forward of its own, which may do more than normalise,"
    " replace it by an nn.Sequential of the nn.BatchNorm that it derives from and what else its forward does, for which"
    " there are other remedies"
)

# Those that normalise and do nothing else.
_FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


def batch_norms(module: nn.Module, name: str = "") -> dict[str, _BatchNorm]:
    """The batch normalisation layers in `module`, itself included, by name."""
    return {n: m for n, m in module.named_modules(prefix=name) if isinstance(m, _BatchNorm)}


def check_frozen(layers: dict[str, _BatchNorm], remedies: str = REMEDIES) -> None:
    """Raise ValueError if one of `layers` would normalise by the statistics of the batch."""
    for name, layer in layers.items():
        if layer.training or layer.running_mean is None:
            kind = type(layer).__name__
            if type(layer).forward not in _FORWARDS:
                remedies = REMEDIES_OF_OWN_FORWARD  # it is captured as a unit, and not converted
            raise ValueError(
                f"module '{name or kind}' ({kind}) normalises by the batch's own statistics, which couples the samples,"
                f" so per-sample gradients do not exist: {remedies}"
            )


def convert_batch_norm(model: nn.Module, num_groups: int = 32) -> nn.Module:
    """A copy of `model` with every batch normalisation replaced by group normalisation (Wu and He, 2018).

    Scale and shift are kept. A layer of n channels gets gcd(n, num_groups) groups; or fewer if these would have one
    channel each, since such groups normalise every value to zero in inputs without further dimensions.

    Args:
        model: not captured.
        num_groups: the largest number of groups of a layer.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if `num_groups` is not positive, or if a batch normalisation has forward hooks or a forward of its
            own, which may do more than normalise, as timm's BatchNormAct2d does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")
    if num_groups < 1:
        raise ValueError(f"num_groups is {num_groups}: pass a positive number")
    for name, layer in batch_norms(model).items():
        hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks)
        if hooks or getattr(layer.forward, "__func__", None) not in _FORWARDS:
            kind = type(layer).__name__
            raise ValueError(
                f"module '{name or kind}' ({kind}) has {'forward hooks' if hooks else 'a forward of its own'}, of which"
                " group normalisation would leave something out: replace it by a module of yours, or leave the model as"
                " it is and call .eval() on its batch normalisations, for frozen statistics"
            )
    if isinstance(model, _BatchNorm):
        return _group_norm(model, num_groups)
    model = copy.deepcopy(model)
    norms = {layer: _group_norm(layer, num_groups) for layer in batch_norms(model).values()}
    for module in [*model.modules()]:
        for name, child in module._modules.items():  # a module may be a child under several names
            if isinstance(child, _BatchNorm):
                setattr(module, name, norms[child])
    return model


def _group_norm(layer: _BatchNorm, num_groups: int) -> nn.GroupNorm:
    channels = layer.num_features
    groups = math.gcd(channels, num_groups)
    if groups == channels:
        groups = max((d for d in range(1, channels // 2 + 1) if channels % d == 0), default=1)
    reference = next((t for t in (layer.weight, layer.running_mean) if t is not None), torch.empty(0))
    norm = nn.GroupNorm(groups, channels, layer.eps, layer.affine, device=reference.device, dtype=reference.dtype)
    if layer.affine:
        norm.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
        norm.weight.requires_grad_(layer.weight.requires_grad)
        norm.bias.requires_grad_(layer.bias.requires_grad)
    return norm.train(layer.training)
