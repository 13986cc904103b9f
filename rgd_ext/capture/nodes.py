"""The autograd nodes that tie a forward to its parameters and hand contributions to the capture in the backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .factors import Factor

if TYPE_CHECKING:
    from .preconditioner import Preconditioner

# (inputs, output gradient), batch first and in the dtype of the parameters -> contributions by parameter name.
BoundRule = Callable[[tuple[Tensor, ...], Tensor], dict[str, Tensor | Factor]]


@dataclass(eq=False)
class Record:
    """One use of some parameters in a forward: what the backward needs besides tensors."""

    capture: Preconditioner
    name: str
    parameters: dict[str, nn.Parameter]
    batch_size: int
    # The backward this forward ran in, if any: re-entrant checkpointing runs forwards inside backwards.
    inside: int


def record(capture: Preconditioner, name: str, parameters: dict[str, nn.Parameter], batch_size: int) -> Record:
    """A record of a forward that runs now."""
    return Record(capture, name, parameters, batch_size, torch._C._current_graph_task_id())


def spread(use: Record) -> dict[str, Tensor]:
    """One copy of each parameter per sample, (B, *shape); their gradients are the contributions."""
    return dict(zip(use.parameters, _Spread.apply(use, *use.parameters.values()), strict=True))


def watch(use: Record, rule: BoundRule, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a layer whose forward ran with detached parameters; its gradient and the inputs go to `rule`."""
    return _apply_watch(use, rule, output, inputs, *use.parameters.values())


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, record: Record, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.record = record
        ctx.set_materialize_grads(False)
        return tuple(p.detach().expand(record.batch_size, *p.shape) for p in parameters)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        record = ctx.record
        contributions = dict(zip(record.parameters, grads, strict=True))
        nodes = [node for node, _ in ctx.next_functions]
        record.capture.receive(record, nodes, lambda: {k: g for k, g in contributions.items() if g is not None})
        return None, *[None] * len(grads)


class _Watch(torch.autograd.Function):
    """The identity.

    The output is detached, not viewed: in-place operations may follow, and version counters stay shared, so that
    autograd still notices when one of them spoils a saved tensor. Inputs are saved by autograd for the same reason.
    """

    @staticmethod
    def forward(ctx, record: Record, rule: BoundRule, output: Tensor, inputs: tuple[Tensor, ...], *parameters: Tensor):
        ctx.record, ctx.rule = record, rule
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        record = ctx.record
        nodes = [node for node, _ in ctx.next_functions[-len(record.parameters) :]]
        # Under autocast gradients arrive in low precision; contributions are in the dtype of the parameters.
        dtype = next(iter(record.parameters.values())).dtype

        def contributions() -> dict[str, Tensor | Factor]:
            inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in ctx.saved_tensors)
            found = ctx.rule(inputs, grad.to(dtype))
            if not found.keys() >= record.parameters.keys():
                raise RuntimeError(
                    f"the rule for '{record.name}' returned contributions for {sorted(found)}, but its trainable"
                    f" parameters are {sorted(record.parameters)}: return one (B, *shape) tensor for each"
                )
            return found

        if grad is not None:
            record.capture.receive(record, nodes, contributions)
            if torch.is_grad_enabled():
                grad = _Differentiated.apply(record.capture, grad, *record.parameters.values())
        return None, None, grad, None, *[None] * len(record.parameters)


# What torch.autograd.Function.apply adds to its base's, at a price, is for torch.func, under which nothing is recorded.
_apply_watch = super(torch.autograd.Function, _Watch).apply


class _Differentiated(torch.autograd.Function):
    """The identity on a gradient that is differentiated again: the layer's detached weights hide that it needs them."""

    @staticmethod
    def forward(ctx, capture: Preconditioner, grad: Tensor, *parameters: Tensor):
        ctx.capture = capture
        return grad.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        nodes = [node for node, _ in ctx.next_functions[1:]]
        ctx.capture.refuse_second_derivative(nodes)
        return None, grad, *[None] * len(nodes)
