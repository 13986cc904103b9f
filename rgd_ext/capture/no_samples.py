"""Calls with an empty batch: no layer is recorded, but their backward joins the exchanges with other processes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..nests import holds_fields
from .model_call import ModelCall
from .native import LayerCall


def run_without_samples(call: ModelCall) -> object:
    """The output of a call with an empty batch, whose backward takes part in the exchanges with other processes."""
    context = call.context
    with context.paused(), torch.no_grad():
        output = call.recorder.original(*call.args, **call.kwargs)
    # It hangs on all parameters, since a backward may be for some of them only, and on what comes before the model.
    roots: list[Tensor] = [p for p in context.model.parameters() if p.requires_grad]
    roots += [x for x in call.arrays if x.requires_grad]
    return _tied(output, LayerCall(context, context.native, call.recorder.name, {}, 0, None, None, None), roots)


def _tied(output: object, empty_call: LayerCall, roots: Sequence[Tensor]) -> object:
    """A copy of `output` whose tensors have the backward of the call."""

    def tie(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return _NoSamples.apply(empty_call, leaf, *roots) if leaf.is_floating_point() else leaf
        if not holds_fields(leaf):
            return leaf
        found = copy.copy(leaf)
        for name, value in vars(leaf).items():
            object.__setattr__(found, name, _tied(value, empty_call, roots))
        return found

    return pytree.tree_map(tie, output)


class _NoSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: LayerCall, output: Tensor, *roots: Tensor) -> Tensor:
        ctx.call = call
        # Only what comes before the model needs gradients, for its own part in the backward.
        ctx.inputs = [None if isinstance(x, torch.nn.Parameter) else x for x in roots]
        return output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.call.context.current_backward(ctx.call)
        return None, None, *[None if x is None else torch.zeros_like(x) for x in ctx.inputs]
