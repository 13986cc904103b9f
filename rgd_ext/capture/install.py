"""Where the taps of a model go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..batch_norm import batch_norms, check_frozen
from .bags import Bags
from .recurrent import FORWARDS, Recurrent
from .rules import rule_for, unit
from .taps import Container, Layer, Slot, Tap
from .units import Attention, Unit
from .wrappers import check_not_wrapped

if TYPE_CHECKING:
    from .preconditioner import Preconditioner


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
        _check_kind(name or type(module).__name__, module)
    if batch_norm == "error":
        check_frozen(batch_norms(model))


def _check_kind(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"module '{name}' is a torch.jit.ScriptModule, whose forward cannot be watched: use the original"
        )
    if isinstance(module, nn.EmbeddingBag) and module.scale_grad_by_freq:
        # Besides, torch's kernel for the CPU divides by the frequencies of other indices.
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


# Their layers get what they get, (T, B, n) with batch_first=False.
_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def _in_time_first(model: nn.Module) -> set[nn.Module]:
    """The modules in transformers of torch.nn with batch_first=False."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, _TRANSFORMERS) and module not in found:
            attention = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
            if attention is not None and not attention.batch_first:
                found.update(module.modules())
    return found


def taps_for(capture: Preconditioner, model: nn.Module) -> list[Tap]:
    """A tap for every module with parameters in or below it; none is installed yet."""
    taps: dict[nn.Module, Tap] = {}
    pending, time_first = [("", model)], _in_time_first(model)
    while pending:
        name, module = pending.pop()
        if module in taps:
            continue
        tap, owned = _tap(capture, module, name)
        if tap is not None:
            taps[module] = tap
            if module in time_first:
                tap.take_time_first()
        if not owned:
            children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
            pending += reversed(children)
    return list(taps.values())


def _tap(capture: Preconditioner, module: nn.Module, name: str) -> tuple[Tap | None, bool]:
    """The tap of one module, and whether it serves all that the module contains."""
    owned = _slots(module.named_modules(remove_duplicate=False))
    registered = None if parametrize.is_parametrized(module) else rule_for(module)
    if registered is not None and registered.rule is not unit:
        return Layer(capture, module, name, owned, registered), True
    is_plain = registered is None and not parametrize.is_parametrized(module)
    if is_plain and type(module).forward is nn.EmbeddingBag.forward:
        return Bags(capture, module, name, owned), True
    if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
        return Attention(capture, module, name, owned), True
    if type(module).forward in FORWARDS and not parametrize.is_parametrized(module):
        return Recurrent(capture, module, name, owned), True
    own = _slots([("", module), *_parameter_lists(module)])
    if registered is not None or parametrize.is_parametrized(module) or (own and len(own) == len(owned)):
        return Unit(capture, module, name, owned), True
    if own:
        return Container(capture, module, name, own), False
    has_forward = type(module).forward is not nn.Module.forward
    return (Tap(capture, module, name, []) if owned and has_forward else None), False


def _slots(modules) -> list[Slot]:
    return [
        (module, key, f"{prefix}.{key}" if prefix else key)
        for prefix, module in modules
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.numel()  # an empty one has no gradient to be wrong
    ]


def _parameter_lists(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """ParameterList, ParameterDict and the like below `module`: without a forward, they belong to who uses them."""
    found = []
    for key, child in module.named_children():
        if type(child).forward is nn.Module.forward:
            found += [(key, child)] if child._parameters else []
            found += [(f"{key}.{name}", inner) for name, inner in _parameter_lists(child)]
    return found
