"""The compiled half of the capture, and the same in Python for an installation without compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id, _will_engine_execute_node

from .._binary import _C
from ..contributions.vectors import VectorLayers

# Which of a call's parameters the backward under way accumulates gradients of; parameters that were frozen since the
# forward are not among them. None if the backward was asked to return one of the gradients.
Wanted: TypeAlias = Sequence[bool] | None


def wanted_by_engine(edges: Sequence[tuple[Any, int]]) -> Wanted:
    """Which parameters the backward under way accumulates gradients of, given a node's edges to their leaves."""
    try:
        return [_will_engine_execute_node(node) and node.variable.requires_grad for node, _ in edges]
    except RuntimeError:  # for leaves whose gradient torch.autograd.grad was asked to return
        return None


class _NativeContext:
    """csrc/python/context.h in Python."""

    def __init__(self, receive: Callable, transform: Callable[[], object]) -> None:
        self.receive, self._transform = receive, transform
        self.pauses = self.call = 0

    def pause(self) -> None:
        self.pauses += 1

    def resume(self) -> None:
        self.pauses -= 1

    def is_recording(self) -> bool:
        return not self.pauses and torch.is_grad_enabled() and self._transform() is None

    def begin_call(self, number: int, batch_size: int | None) -> None:
        self.call = number

    def end_call(self) -> None:
        """Only compiled layers ask for the call under way."""

    def begin_backward(self, collector: _Collector) -> None:
        """Only compiled nodes hand anything to a collector by themselves."""

    def watch(self, parameter: nn.Parameter) -> None:
        """Only compiled layers ask which parameters are watched."""

    def unwatch(self, parameter: nn.Parameter) -> None:
        """As `watch`."""


class _LayerCall:
    """csrc/python/layer_call.h in Python."""

    __slots__ = (
        "batch_size",
        "context",
        "inside",
        "name",
        "native",
        "number",
        "operands",
        "parameters",
        "rule",
        "spec",
    )

    def __init__(self, context, native, name, parameters, batch_size, rule=None, spec=None, operands=None) -> None:
        self.context, self.native, self.name, self.parameters = context, native, name, parameters
        self.batch_size, self.rule, self.spec, self.operands = batch_size, rule, spec, operands
        self.number, self.inside = native.call, _current_graph_task_id()


class _Collector:
    """csrc/python/collector.h in Python, where every layer is looked at one by one."""

    def __init__(self, task: int, batch_size: int, each: int, all: int, share: float) -> None:  # noqa: A002
        self._found: dict[tuple, tuple[list[nn.Parameter], list[Tensor], list[Tensor], list[bool]]] = {}

    def take_vectors(self, call: LayerCall, input: Tensor, grad: Tensor) -> bool:  # noqa: A002
        weight, bias = call.parameters.get("weight"), call.parameters.get("bias")
        parameter = bias if weight is None else weight
        is_linear = call.spec is not None and call.spec.kind == "linear" and grad.ndim == 2
        if not is_linear or parameter is None or not input.dtype == grad.dtype == parameter.dtype:
            return False
        self._add(weight, bias, input, grad)
        return True

    def _add(self, weight: nn.Parameter | None, bias: nn.Parameter | None, x: Tensor, e: Tensor) -> None:
        parameters, inputs, grads, biases = self._found.setdefault((e.dtype, e.device), ([], [], [], []))
        parameters += [p for p in (bias, weight) if p is not None]
        inputs.append(x.new_empty(len(x), 0) if weight is None else x)
        grads.append(e)
        biases.append(bias is not None)

    def take_small(self, call: LayerCall, input: Tensor, grad: Tensor) -> bool:  # noqa: A002
        return False

    def vectors(self) -> list[tuple[list[nn.Parameter], list[Tensor], list[Tensor], list[bool]]]:
        found, self._found = list(self._found.values()), {}
        return found

    def gradients(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        return []


class _Watch(torch.autograd.Function):
    """csrc/python/watch.cpp in Python: the identity on a layer's output.

    The output is detached, not viewed: in-place operations may follow, and version counters stay shared, so that
    autograd still notices when one of them spoils a saved tensor. Inputs are saved by autograd for the same reason.
    """

    @staticmethod
    def forward(ctx, call: LayerCall, output: Tensor, inputs: tuple[Tensor, ...], *parameters: Tensor):
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        call = ctx.call
        count = len(call.parameters)
        if grad is not None:
            wanted = wanted_by_engine(ctx.next_functions[-count:])
            tensors = ctx.saved_tensors if wanted is None or any(wanted) else ()
            grad = call.native.receive(call, tensors, grad, wanted)
        return None, grad, None, *[None] * count


def _watch(call: LayerCall, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    return _Watch.apply(call, output, inputs, *call.parameters.values())


def _no_layer(*_) -> None:
    """Without compiled code every layer is recorded in Python."""


if _C is not None:
    from .._C import Collector, LayerCall, NativeContext, watch

    layer, guard, GUARD_HOOKS = _C.Layer, _C.Guard, 0
else:
    NativeContext, LayerCall, Collector = _NativeContext, _LayerCall, _Collector  # type: ignore[misc]  # of the same interface
    watch, layer = _watch, _no_layer
    # (parameter, callable) -> a hook that `remove` takes away; and how many hooks that makes in Python's list.
    guard, GUARD_HOOKS = Tensor.register_hook, 1


# Whether nodes ask the collector of the backward under way before they call `receive`.
NODES_ASK = _C is not None


def vector_buckets(collector: Collector) -> list[tuple[list[nn.Parameter], VectorLayers]]:
    """The linear layers that a collector has taken, by dtype and device."""
    buckets = collector.vectors()
    return [(parameters, VectorLayers(inputs, grads, biases)) for parameters, inputs, grads, biases in buckets]


def native_spec(spec: tuple[str, int, float] | None) -> Any:
    """A layer's spec as compiled code takes it."""
    return spec if _C is None or spec is None else _C.LayerSpec(*spec)
