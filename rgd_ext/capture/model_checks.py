"""The checks of a model before it is captured."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..batch_norm import batch_norms, check_frozen
from .wrappers import check_not_wrapped


def check_model(model: nn.Module, batch_norm: str) -> None:
    """Raise ValueError where `model` cannot be captured, saying why."""
    check_not_wrapped(model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise ValueError(f"parameter '{name}' is not initialised: run one batch through the model first")
        if parameter.requires_grad and not parameter.dtype.is_floating_point:
            raise ValueError(
                f"parameter '{name}' has dtype {parameter.dtype}: trainable parameters must be real; keep one of"
                " complex numbers as pairs, (..., 2), and use torch.view_as_complex of it"
            )
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(
            f"the model ({type(model).__name__}) has no trainable parameters: nothing to precondition; set"
            " requires_grad on some"
        )
    for name, module in model.named_modules():
        _check_module(name or type(module).__name__, module)
    if batch_norm == "error":
        check_frozen(batch_norms(model))


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"module '{name}' is a torch.jit.ScriptModule, whose forward cannot be watched: use the original"
        )
    if isinstance(module, nn.EmbeddingBag) and module.scale_grad_by_freq:
        # Besides, torch's kernel for the CPU divides by the frequencies of the wrong indices.
        raise ValueError(
            f"module '{name}' (EmbeddingBag) scales its gradient by how often the batch has an index, which couples the"
            " samples: build it with scale_grad_by_freq=False"
        )
    for key, value in vars(module).items():
        if isinstance(value, torch.Tensor) and any(f"{key}_{part}" in module._parameters for part in ("g", "orig")):
            raise ValueError(
                f"module '{name}' computes its '{key}' in a hook before its forward (torch.nn.utils.weight_norm,"
                " spectral_norm or prune): use weight_norm or spectral_norm of torch.nn.utils.parametrizations instead,"
                " and for pruning torch.nn.utils.parametrize.register_parametrization with a product by the mask"
            )
