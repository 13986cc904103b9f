"""The autograd nodes that tie a forward to its parameters, and hand their contributions to the backward under way."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import compress

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .context import reentrant_message
from .derivatives import THROUGH_LAYER, InnerDerivative
from .native import LayerCall, Wanted, wanted_by_engine
from .native import watch as watch_natively

FORWARD_MODE = (
    "a forward-mode derivative through a captured model: run the forward under `with handle.paused():`, or take"
    " torch.func.jvp, which goes past the capture"
)
SECOND_DERIVATIVE = (
    "create_graph=True through a captured model: directions have no derivative, and the gradient of a gradient does not"
    " reach the parameters. Run the forward and the backward, or the whole gradient penalty, under"
    " `with handle.paused():`"
)
RETURNED_GRADIENT = (
    "torch.autograd.grad with respect to parameters of a captured model: their gradient is not formed. Run the forward"
    " and torch.autograd.grad under `with handle.paused():`"
)


def receive(call: LayerCall, inputs: Sequence[Tensor], grad: Tensor, wanted: Wanted) -> Tensor:
    """Called in the backward of a layer that was watched; returns the gradient to pass on."""
    names = _wanted_names(call, wanted)
    if names:
        call.context.current_backward(call).receive(call, names, inputs, grad)
    if torch.is_grad_enabled():
        if call.context.derivatives is not None:
            raise InnerDerivative(THROUGH_LAYER.format(call.name))
        return _Differentiated.apply(grad, *call.parameters.values())
    return grad


def _wanted_names(call: LayerCall, wanted: Wanted) -> Collection[str]:
    """The names of the parameters that the backward under way is for."""
    if wanted is None:
        raise RuntimeError(RETURNED_GRADIENT if call.inside == -1 else reentrant_message(call))
    names = call.parameters if all(wanted) else list(compress(call.parameters, wanted))
    if names and torch.is_grad_enabled():
        raise RuntimeError(SECOND_DERIVATIVE)
    return names


def parameter_copies(call: LayerCall) -> dict[str, Tensor]:
    """One copy of each parameter per sample, (B, *shape); their gradients are the contributions."""
    return dict(zip(call.parameters, _ParameterCopies.apply(call, *call.parameters.values()), strict=True))


def watch(call: LayerCall, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a layer whose forward ran with detached parameters, tied to these."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(output).tangent is not None:
        raise RuntimeError(FORWARD_MODE)
    if type(output) is not Tensor:
        plain = output.as_subclass(Tensor)
        if type(plain) is Tensor:  # nodes make plain tensors of it; those of a dispatch mode stay what they are
            return watch(call, plain, inputs).as_subclass(type(output))
    return watch_natively(call, output, inputs)


class _ParameterCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: LayerCall, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(p.detach().expand(call.batch_size, *p.shape) for p in parameters)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        call = ctx.call
        contributions = dict(zip(call.parameters, grads, strict=True))
        names = _wanted_names(call, wanted_by_engine(ctx.next_functions))
        if names:
            backward = call.context.current_backward(call)
            backward.contribute(call, [name for name in names if contributions[name] is not None], contributions)
        return None, *[None] * len(grads)


class _Differentiated(torch.autograd.Function):
    """The identity on a gradient that is differentiated again: the layer's detached weights hide that it needs them."""

    @staticmethod
    def forward(ctx, grad: Tensor, *parameters: Tensor):
        return grad.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        edges = ctx.next_functions[1:]
        wanted = wanted_by_engine(edges)
        if wanted is None or any(wanted):
            raise RuntimeError(SECOND_DERIVATIVE)
        return grad, *[None] * len(edges)
