"""The autograd nodes that tie a forward to its parameters and hand contributions to the capture in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id, _will_engine_execute_node
from torch.autograd import forward_ad

from .._binary import _C
from ..reference import accumulate_dtype
from .factors import Factor, of_dtype

if TYPE_CHECKING:
    from .preconditioner import Preconditioner

FORWARD_MODE = (
    "a forward-mode derivative through a captured model: run the forward under `with handle.paused():`, or take"
    " torch.func.jvp, which goes past the capture"
)
# By parameter name.
Contributions: TypeAlias = dict[str, Tensor | Factor]
# (inputs, output gradient), batch first and in the dtype of the parameters -> contributions.
BoundRule: TypeAlias = Callable[[tuple[Tensor, ...], Tensor], Contributions]
# Which of a record's parameters the backward under way accumulates gradients of, those aside that were frozen since the
# forward; None if it was asked to return one.
Wanted: TypeAlias = Sequence[bool] | None


class Record:
    """One use of some parameters in a forward that runs now: what the backward needs besides tensors."""

    __slots__ = ("as_linear", "batch_size", "call", "capture", "inside", "kind", "name", "parameters", "rule")

    def __init__(
        self,
        capture: Preconditioner,
        name: str,
        parameters: dict[str, nn.Parameter],
        batch_size: int,
        rule: BoundRule | None = None,
        kind: str | None = None,
    ) -> None:
        self.capture, self.name, self.parameters, self.batch_size = capture, name, parameters, batch_size
        self.call = capture.calls_begun  # the one that runs now
        # Of a layer with samples along dimension 0 whose rule is in `rules.KINDS`.
        self.rule, self.kind = rule, kind
        # (x, output gradient) -> those of the nn.Linear that the product is, for products that are not as they are.
        self.as_linear: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        # The backward this forward runs in, if any: re-entrant checkpointing runs forwards inside backwards.
        self.inside = _current_graph_task_id()

    def receive(self, inputs: Sequence[Tensor], grad: Tensor, wanted: Wanted) -> Tensor:
        """Called in the backward of a layer that was watched; returns the gradient to pass on."""
        capture = self.capture
        names = capture.admitted(self, wanted)
        kept = grad
        if names and capture.is_collecting():
            # What outlives the backward must not change with a buffer that the next batch is copied to, nor hold a
            # graph.
            inputs, kept = [x.clone() if x.grad_fn is None else x.detach() for x in inputs], grad.clone()
        is_linear = self.kind == "linear" or self.as_linear is not None
        if is_linear and len(names) == len(self.parameters) and self._is_one_vector(inputs[0], kept):
            x, e = (inputs[0], kept) if self.as_linear is None else self.as_linear(inputs[0], kept)
            capture.aside.layers.append((self.parameters, x, e))
        elif names:
            capture.keep(self, names, inputs, kept)
        if torch.is_grad_enabled():
            return _Differentiated.apply(self.capture, grad, *self.parameters.values())
        return grad

    def _is_one_vector(self, x: Tensor, grad: Tensor) -> bool:
        """Per sample, in the dtype of the parameters."""
        dtype = grad.dtype
        return grad.ndim == 2 and x.dtype == dtype and next(iter(self.parameters.values())).dtype == dtype

    def _multiplies_as_they_are(self, grad: Tensor, dtype: torch.dtype) -> bool:
        """Whether CUDA's matrix units can multiply it in 16 bits: a linear layer on sequences, under autocast."""
        is_mixed = dtype == accumulate_dtype(grad.dtype) != grad.dtype
        return is_mixed and grad.is_cuda and self.kind == "linear" and grad.shape[1:-1].numel() > 1

    def contributions(self, inputs: Sequence[Tensor], grad: Tensor) -> Contributions:
        """What the rule gives."""
        # Under autocast gradients arrive in low precision; contributions are in the dtype of the parameters.
        dtype = next(iter(self.parameters.values())).dtype
        if self._multiplies_as_they_are(grad, dtype):
            # The inputs are rounded as they were for the product in the forward.
            return of_dtype(self.rule((inputs[0].to(grad.dtype),), grad), dtype)
        inputs = [x.to(dtype) if x.dtype != dtype and x.is_floating_point() else x for x in inputs]
        return self.rule(tuple(inputs), grad if grad.dtype == dtype else grad.to(dtype))


def spread(use: Record) -> dict[str, Tensor]:
    """One copy of each parameter per sample, (B, *shape); their gradients are the contributions."""
    return dict(zip(use.parameters, _Spread.apply(use, *use.parameters.values()), strict=True))


def watch(use: Record, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a layer whose forward ran with detached parameters; its gradient and the inputs go to `use`."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(output).tangent is not None:
        raise RuntimeError(FORWARD_MODE)
    if type(output) is not Tensor:
        plain = output.as_subclass(Tensor)
        if type(plain) is Tensor:  # nodes make plain tensors of it; those of a dispatch mode stay what they are
            return watch(use, plain, inputs).as_subclass(type(output))
    return _watch(use, output, inputs, tuple(use.parameters.values()))


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
        names = record.capture.admitted(record, _will_accumulate(ctx.next_functions))
        taking_part = [name for name in names if contributions[name] is not None]
        if taking_part:
            record.capture.contribute(record, taking_part, contributions)
        return None, *[None] * len(grads)


class _Watch(torch.autograd.Function):
    """The identity: what csrc/python/watch.cpp does at a fraction of the price, where it was compiled.

    The output is detached, not viewed: in-place operations may follow, and version counters stay shared, so that
    autograd still notices when one of them spoils a saved tensor. Inputs are saved by autograd for the same reason.
    """

    @staticmethod
    def forward(ctx, record: Record, output: Tensor, inputs: tuple[Tensor, ...], *parameters: Tensor):
        ctx.record = record
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        record = ctx.record
        count = len(record.parameters)
        if grad is not None:
            wanted = _will_accumulate(ctx.next_functions[-count:])
            grad = record.receive(ctx.saved_tensors if wanted is None or any(wanted) else (), grad, wanted)
        return None, grad, None, *[None] * count


def _watch_in_python(
    record: Record, output: Tensor, inputs: tuple[Tensor, ...], parameters: tuple[nn.Parameter, ...]
) -> Tensor:
    return _Watch.apply(record, output, inputs, *parameters)


_watch = _watch_in_python if _C is None else _C.watch


def _will_accumulate(edges: Sequence[tuple[torch.autograd.graph.Node, int]]) -> Wanted:
    """Of the edges of a node to the gradients of parameters."""
    try:
        return [_will_engine_execute_node(node) and node.variable.requires_grad for node, _ in edges]
    except RuntimeError:  # for leaves whose gradient torch.autograd.grad was asked to return
        return None


class _Differentiated(torch.autograd.Function):
    """The identity on a gradient that is differentiated again: the layer's detached weights hide that it needs them."""

    @staticmethod
    def forward(ctx, capture: Preconditioner, grad: Tensor, *parameters: Tensor):
        ctx.capture = capture
        return grad.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        edges = ctx.next_functions[1:]
        ctx.capture.refuse_second_derivative(_will_accumulate(edges))
        return None, grad, *[None] * len(edges)
