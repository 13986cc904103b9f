"""Which module of a model gets which recorder."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from ..layers.linear import linear
from ..layers.registry import rule_for, unit
from .context import CaptureContext
from .recorders.attention import AttentionRecorder
from .recorders.container import ContainerRecorder
from .recorders.differentiated import DifferentiatedLinear
from .recorders.embedding_bag import EmbeddingBagRecorder
from .recorders.layer import LayerRecorder
from .recorders.recorder import NamedPlace, Recorder
from .recorders.recurrent import FORWARDS, RecurrentRecorder
from .recorders.unit import UnitRecorder
from .wrappers import check_whole

# With batch_first=False these give all layers inside of them (T, B, n), as they get it.
_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def _modules_with_time_first(model: nn.Module) -> set[nn.Module]:
    """The transformers of torch.nn with batch_first=False, and all modules inside of them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, _TRANSFORMERS) and module not in found:
            attention = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
            if attention is not None and not attention.batch_first:
                found.update(module.modules())
    return found


def recorders_for(context: CaptureContext, model: nn.Module) -> list[Recorder]:
    """The recorders of a model, not installed yet: for every module with parameters in it or below."""
    recorders: dict[nn.Module, Recorder] = {}
    pending, time_first = [("", model)], _modules_with_time_first(model)
    while pending:
        name, module = pending.pop()
        if module in recorders:
            continue
        recorder, serves_children = _recorder(context, module, name)
        if recorder is not None:
            recorders[module] = recorder
            if module in time_first:
                recorder.expect_time_first()
        if serves_children:
            check_whole(module, name or type(module).__name__)
        else:
            children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
            pending += reversed(children)
    return list(recorders.values())


def _recorder(context: CaptureContext, module: nn.Module, name: str) -> tuple[Recorder | None, bool]:
    """The recorder of a module, or None, and whether it serves the modules below as well."""
    contained = _places(module.named_modules(remove_duplicate=False))
    if context.options.is_unit:
        return UnitRecorder(context, module, name, contained), True
    registered = None if parametrize.is_parametrized(module) else rule_for(module)
    if registered is not None and registered.rule is linear and context.derivatives is not None:
        return DifferentiatedLinear(context, module, name, contained, registered), True
    if registered is not None and registered.rule is not unit:
        return LayerRecorder(context, module, name, contained, registered), True
    is_plain = registered is None and not parametrize.is_parametrized(module)
    if is_plain and type(module).forward is nn.EmbeddingBag.forward:
        return EmbeddingBagRecorder(context, module, name, contained), True
    if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
        return AttentionRecorder(context, module, name, contained), True
    if type(module).forward in FORWARDS and not parametrize.is_parametrized(module):
        return RecurrentRecorder(context, module, name, contained), True
    own = _places([("", module), *_parameter_lists(module)])
    if registered is not None or parametrize.is_parametrized(module) or (own and len(own) == len(contained)):
        return UnitRecorder(context, module, name, contained), True
    if own:
        return ContainerRecorder(context, module, name, own), False
    has_forward = type(module).forward is not nn.Module.forward
    return (Recorder(context, module, name, []) if contained and has_forward else None), False


def _places(modules: Iterable[tuple[str, nn.Module]]) -> list[NamedPlace]:
    """The places of parameters in modules, given with their names in the recorded module."""
    return [
        (module, key, f"{prefix}.{key}" if prefix else key)
        for prefix, module in modules
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.numel()  # an empty one has no gradient to be wrong
    ]


def _parameter_lists(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules without a forward below `module`, such as nn.ParameterList, whose parameters `module` uses."""
    found = []
    for key, child in module.named_children():
        if type(child).forward is nn.Module.forward:
            found += [(key, child)] if child._parameters else []
            found += [(f"{key}.{name}", inner) for name, inner in _parameter_lists(child)]
    return found
