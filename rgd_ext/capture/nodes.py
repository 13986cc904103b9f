"""The autograd nodes that tie a forward to its parameters and hand contributions to the capture in the backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id

from .factors import Factor

if TYPE_CHECKING:
    from .preconditioner import Preconditioner

# (inputs, output gradient), batch first and in the dtype of the parameters -> contributions by parameter name.
BoundRule = Callable[[tuple[Tensor, ...], Tensor], dict[str, Tensor | Factor]]
# Of an autograd node, to the nodes that accumulate the gradients of its parameters.
Edges: TypeAlias = tuple[tuple[torch.autograd.graph.Node, int], ...]


class Record:
    """One use of some parameters in a forward that runs now: what the backward needs besides tensors."""

    __slots__ = ("batch_size", "capture", "inside", "name", "parameters")

    def __init__(
        self, capture: Preconditioner, name: str, parameters: dict[str, nn.Parameter], batch_size: int
    ) -> None:
        self.capture, self.name, self.parameters, self.batch_size = capture, name, parameters, batch_size
        # The backward this forward runs in, if any: re-entrant checkpointing runs forwards inside backwards.
        self.inside = _current_graph_task_id()


def spread(use: Record) -> dict[str, Tensor]:
    """One copy of each parameter per sample, (B, *shape); their gradients are the contributions."""
    return dict(zip(use.parameters, _Spread.apply(use, *use.parameters.values()), strict=True))


def watch(use: Record, rule: BoundRule, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a layer whose forward ran with detached parameters; its gradient and the inputs go to `rule`."""
    return _apply(use, rule, output, inputs, *use.parameters.values())


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
        edges = ctx.next_functions
        record.capture.receive(record, edges, lambda: {k: g for k, g in contributions.items() if g is not None})
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
        parameters = record.parameters
        if grad is not None:
            edges = ctx.next_functions[-len(parameters) :]
            record.capture.receive(record, edges, partial(_contributions, record, ctx, grad))
            if torch.is_grad_enabled():
                grad = _Differentiated.apply(record.capture, grad, *parameters.values())
        return None, None, grad, None, *[None] * len(parameters)


# What torch.autograd.Function.apply adds to its base's, at a price, is for torch.func, under which nothing is recorded.
_apply = super(torch.autograd.Function, _Watch).apply


def _contributions(record: Record, ctx, grad: Tensor) -> dict[str, Tensor | Factor]:
    # Under autocast gradients arrive in low precision; contributions are in the dtype of the parameters.
    dtype = next(iter(record.parameters.values())).dtype
    found = ctx.rule(tuple([_cast(x, dtype) for x in ctx.saved_tensors]), _cast(grad, dtype))
    if not found.keys() >= record.parameters.keys():
        raise RuntimeError(
            f"the rule for '{record.name}' returned contributions for {sorted(found)}, but its trainable"
            f" parameters are {sorted(record.parameters)}: return one (B, *shape) tensor for each"
        )
    return found


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.dtype != dtype and x.is_floating_point() else x


class _Differentiated(torch.autograd.Function):
    """The identity on a gradient that is differentiated again: the layer's detached weights hide that it needs them."""

    @staticmethod
    def forward(ctx, capture: Preconditioner, grad: Tensor, *parameters: Tensor):
        ctx.capture = capture
        return grad.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        edges = ctx.next_functions[1:]
        ctx.capture.refuse_second_derivative(edges)
        return None, grad, *[None] * len(edges)
