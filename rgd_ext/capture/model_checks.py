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


def check_model_of_group(model: nn.Module) -> None:
    """Raise ValueError for modules and tensors that several processes cannot train together, saying why."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        problem = _problem_of_writing(tensor)
        if problem:
            raise ValueError(f"'{name}' {problem}, so that it cannot become that of rank 0: replace it by a copy")
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise ValueError(
                f"module '{name}' is a SyncBatchNorm, whose forward waits for other processes, as often as it is"
                " called: for per-sample gradients use nn.BatchNorm with batch_norm='contribution', by which each"
                " process has statistics of its own, or rgd_ext.convert_batch_norm(model); or call .eval() on it"
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"module '{name}' ({type(module).__name__}) has sparse gradients, which process groups do not exchange:"
                " build it with sparse=False"
            )


def _problem_of_writing(tensor: torch.Tensor) -> str:
    """Why a tensor cannot be overwritten by one of another process; empty if it can."""
    if tensor.is_meta:
        return "is on the meta device, without values"
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout}"
    if tensor.is_inference():
        return "was made in inference mode"
    if tensor.is_conj() or tensor.is_neg():
        return "is a lazy conjugate or negative"
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return "is expanded, with several elements in one place"
    return ""


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
