"""What the rule of a layer gives in the backward, given the layer's call in the forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from ..contributions.factor import Factor
from ..contributions.outer import with_dtype
from ..linalg import accumulate_dtype
from .native import LayerCall

# By parameter name.
RuleOutput: TypeAlias = Mapping[str, Tensor | Factor]
# (inputs, output gradient), batch first and in the dtype of the parameters -> contributions.
BoundRule: TypeAlias = Callable[[tuple[Tensor, ...], Tensor], RuleOutput]


def apply_rule(call: LayerCall, inputs: Sequence[Tensor], grad: Tensor) -> RuleOutput:
    """The contributions that the rule of the layer gives."""
    # Under autocast gradients arrive in low precision; contributions are in the dtype of the parameters.
    dtype = next(iter(call.parameters.values())).dtype
    if _can_multiply_in_16_bits(call, grad, dtype):
        # The inputs are rounded as they were for the product in the forward.
        return with_dtype(call.rule((inputs[0].to(grad.dtype),), grad), dtype)
    inputs = [x.to(dtype) if x.dtype != dtype and x.is_floating_point() else x for x in inputs]
    return call.rule(tuple(inputs), grad if grad.dtype == dtype else grad.to(dtype))


def _can_multiply_in_16_bits(call: LayerCall, grad: Tensor, dtype) -> bool:
    """Whether CUDA's matrix units can multiply inputs and output gradient in 16 bits.

    They can for a linear layer on sequences, under autocast.
    """
    if not grad.is_cuda or grad.dtype == dtype or dtype != accumulate_dtype(grad.dtype):
        return False  # nearly always on the CPU
    return call.spec is not None and call.spec.kind == "linear" and grad.shape[1:-1].numel() > 1


def checked(call: LayerCall, name: str, contributions: Tensor) -> Tensor:
    """Contributions that a rule returned for a parameter, in its dtype.

    Raises:
        ValueError: if their shape is not (B, *shape).
    """
    parameter = call.parameters[name]
    expected = (call.batch_size, *parameter.shape)
    if contributions.shape != expected:
        raise ValueError(
            f"the rule for '{call.name}' returned contributions of shape {tuple(contributions.shape)} for '{name}':"
            f" expected (B, *shape) = {expected}"
        )
    return contributions if contributions.dtype == parameter.dtype else contributions.to(parameter.dtype)


def missing_error(call: LayerCall, found: RuleOutput) -> Exception:
    """The error for a rule that leaves out a parameter."""
    none = [name for name in call.parameters if found.get(name, "") is None]
    if none:
        return TypeError(f"the rule for '{call.name}' returned None for '{none[0]}': return a (B, *shape) tensor")
    return RuntimeError(
        f"the rule for '{call.name}' returned contributions for {sorted(found)}, but its trainable parameters are"
        f" {sorted(call.parameters)}: return one (B, *shape) tensor for each"
    )
