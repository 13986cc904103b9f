"""The registry of the layers that the capture knows, by module type.

A rule is called as rule(module, inputs, output_grad) with the batch in front, in the dtype of the parameters. It
returns, by parameter name, h_i = (d output_i / d parameter)^T output_grad_i: a (B, *shape) tensor, or a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from ..contributions.factor import Factor
from .convolution import convolution, transposed_convolution
from .embedding import embedding
from .linear import bilinear, linear, linear_spec
from .norm import (
    batch_norm,
    group_norm,
    group_norm_spec,
    instance_norm,
    layer_norm,
    layer_norm_spec,
    rms_norm,
    rms_norm_spec,
)
from .spec import LayerSpec

Module = TypeVar("Module", bound=nn.Module)
# The first argument is a module of the type that the rule serves.
Rule: TypeAlias = Callable[[Any, tuple[Tensor, ...], Tensor], Mapping[str, Tensor | Factor]]


@dataclass(frozen=True)
class LayerType:
    """What the capture knows of a type of layers.

    Attributes:
        rule: the rule.
        sample_ndim: the least number of dimensions that one sample of the module's input has, or a function of the
            module that returns it.
        at: the dimension of the samples, where the definition of the layer fixes it.
        spec: a function of the module that returns its `LayerSpec`, or None if the operator `layer_grads` does not
            serve it; None where it serves no module of the type.
    """

    rule: Rule
    sample_ndim: int | Callable[[Any], int] = 0
    at: int | None = None
    spec: Callable[[Any], LayerSpec | None] | None = None

    def minimum(self, module: nn.Module) -> int:
        """The least number of dimensions that one sample of the input of `module` has."""
        return self.sample_ndim(module) if callable(self.sample_ndim) else self.sample_ndim

    def spec_of(self, module: nn.Module) -> LayerSpec | None:
        """`module` as the operator `layer_grads` takes it, or None if the operator does not serve it.

        It depends on what may change while the model is captured: on eps, and for an RMS norm without one on the dtype
        of the weight.
        """
        if self.spec is None or not _has_weight_and_bias_alone(module):
            return None
        return self.spec(module)


def _has_weight_and_bias_alone(module: nn.Module) -> bool:
    parameters = module._parameters
    return parameters.get("weight") is not None and parameters.keys() <= {"weight", "bias"} and not module._modules


# The attribute of modules for which `register_rule` was called with `unit`.
_UNIT = "_rgd_ext_unit"


def unit(module: nn.Module, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """The rule that captures a module and all it contains as one function, under `torch.func.vmap`.

    Pass it to `register_rule` for modules whose parameters no finer rule can follow. It is what modules without a
    rule and without children get by default. The module sees one sample at a time, as a batch of one.
    """
    raise RuntimeError("rgd_ext.unit is a marker for register_rule; it is not called")


def register_rule(
    module_type: type[Module] | Module,
    rule: Callable[[Module, tuple[Tensor, ...], Tensor], Mapping[str, Tensor | Factor]],
) -> None:
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
    _registry[module_type] = LayerType(rule)


def rule_for(module: nn.Module) -> LayerType | None:
    """The type that `module` is of, or None.

    It is None for a subclass with a `forward` of its own, which computes something else.
    """
    if _UNIT in module.__dict__:
        return LayerType(unit)
    for ancestor in type(module).__mro__:
        if ancestor in _registry:
            return _registry[ancestor] if type(module).forward is ancestor.forward else None
    return None


def _normalised_ndim(module: nn.LayerNorm | nn.RMSNorm) -> int:
    return len(module.normalized_shape)


_registry: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType(linear, 1, spec=linear_spec),
    nn.Bilinear: LayerType(bilinear, 1),
    nn.Embedding: LayerType(embedding),
    nn.Conv1d: LayerType(convolution, 2),
    nn.Conv2d: LayerType(convolution, 3),
    nn.Conv3d: LayerType(convolution, 4),
    nn.ConvTranspose1d: LayerType(transposed_convolution, 2),
    nn.ConvTranspose2d: LayerType(transposed_convolution, 3),
    nn.ConvTranspose3d: LayerType(transposed_convolution, 4),
    nn.LayerNorm: LayerType(layer_norm, _normalised_ndim, spec=layer_norm_spec),
    nn.RMSNorm: LayerType(rms_norm, _normalised_ndim, spec=rms_norm_spec),
    nn.GroupNorm: LayerType(group_norm, 1, at=0, spec=group_norm_spec),
    nn.InstanceNorm1d: LayerType(instance_norm, 2),
    nn.InstanceNorm2d: LayerType(instance_norm, 3),
    nn.InstanceNorm3d: LayerType(instance_norm, 4),
    nn.BatchNorm1d: LayerType(batch_norm, 1, at=0),
    nn.BatchNorm2d: LayerType(batch_norm, 3),
    nn.BatchNorm3d: LayerType(batch_norm, 4),
}
