"""What recorders and autograd nodes see of a capture."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch._C import _current_graph_task_id, _functorch

from ..contributions.ledger import Contributions
from ..distributed import ModelParameters
from ..planning.planner import Planner
from .backward import Backward
from .batch import check_not_empty
from .calls import Calls
from .derivatives import OUTSIDE, Derivatives, InnerDerivative
from .native import LayerCall, NativeContext
from .parameters import WatchedParameters
from .sinks import CallNumbers, HandOver, Sink

NESTED = (
    "a backward through the captured model ran inside another one, from a hook or an autograd function: it took the"
    " place of the outer one, whose direction is lost. Run them one after the other, or the forward and the backward of"
    " one under `with handle.paused():`"
)


class Options(NamedTuple):
    """Options of a capture.

    Attributes:
        batch_norm: what to do about batch normalisation in training mode.
        batch_dim: the dimension of the samples in the model's inputs, or None where each call is for one sample.
        memory_budget: how many bytes per-sample gradients may take at the end of a backward; None for the default.
        kept: how many bytes may stay allocated between backwards.
        derivatives: whether forwards may be differentiated with respect to their inputs.
        is_unit: whether the model is captured as one unit.
    """

    batch_norm: Literal["error", "contribution"]
    batch_dim: int | None
    memory_budget: float | None
    kept: int
    derivatives: bool = False
    is_unit: bool = False


class CaptureContext:
    """The capture of a model, as recorders and autograd nodes see it.

    Args:
        parameters: of the captured model.
        options: the options of the capture.
        receive: (call, inputs, output gradient, wanted) -> the gradient to pass on; for compiled nodes.

    Attributes:
        model: the captured model.
        options: as given.
        native: the half of the context that compiled code sees.
        parameters: the parameters of the model.
        calls: the calls of the model.
        sink: what backwards are for.
        derivatives: follows derivatives of forwards with respect to their inputs, or None.
        is_proving: whether the forwards and backwards that run now are those of a verification.
        enter: (recorder, args, kwargs) -> the output of a call from outside of the model's forward.
    """

    def __init__(self, parameters: ModelParameters, options: Options, receive: Callable) -> None:
        self.model, self.options = parameters.model, options
        self.native = NativeContext(receive, _functorch.peek_interpreter_stack)
        self.parameters = WatchedParameters(parameters, self.native, self._refuse_outside)
        self.calls = Calls(self.native)
        self.derivatives = Derivatives() if options.derivatives else None
        self.sink: Sink  # from `start` on
        self.is_proving = False
        self.enter: Callable[[Any, tuple, dict], object]  # from `start` on
        self._is_removed = False
        # A weak reference: the engine has the other one, so a backward that fails is gone with all it has gathered.
        self._backward: Callable[[], Backward | None] = _nothing
        # The tasks of backwards that had not ended when another one began.
        self._unfinished: set[int] = set()

    def start(self, sink: Sink, enter: Callable[[Any, tuple, dict], object]) -> None:
        """Begin the capture: backwards are for `sink`, and calls from outside go through `enter`."""
        self.sink, self.enter = sink, enter

    @property
    def is_removed(self) -> bool:
        """Whether the capture has ended."""
        return self._is_removed

    def remove(self) -> None:
        """End the capture."""
        self._is_removed = True
        self.native.pause()
        self.parameters.release()

    def is_recording(self) -> bool:
        """Whether forwards are recorded now: not when paused, without gradients, or inside torch.func transforms."""
        return self.native.is_recording()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ordinary autograd for a while."""
        self.native.pause()
        try:
            yield
        finally:
            self.native.resume()

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """A capture that is paused records for a while."""
        self.native.resume()
        try:
            yield
        finally:
            self.native.pause()

    @contextmanager
    def proving(self) -> Iterator[None]:
        """Forwards and backwards inside are those of a verification."""
        self.is_proving = True
        try:
            yield
        finally:
            self.is_proving = False

    def switch(self, sink: Sink) -> Sink:
        """From now on backwards are for `sink`. Returns the sink before."""
        before, self.sink = self.sink, sink
        return before

    @contextmanager
    def directed_to(self, sink: Sink) -> Iterator[None]:
        """Backwards inside are for `sink`."""
        before = self.switch(sink)
        try:
            yield
        finally:
            self.switch(before)

    @contextmanager
    def collecting(self, planner: Planner, keeps_contributions: bool) -> Iterator[list[Contributions]]:
        """Backwards inside add their contributions to the list this yields, and write nothing.

        Args:
            planner: chooses the strategies.
            keeps_contributions: as for `Sink`.
        """
        parts: list[Contributions] = []

        def take(contributions: Contributions, passed: CallNumbers) -> None:
            parts.append(contributions)

        with self.directed_to(HandOver(take, planner, self.parameters, keeps_contributions)):
            yield parts

    def current_backward(self, call: LayerCall) -> Backward:
        """The backward under way, in which a layer gets its gradient. With the first layer a backward begins."""
        task = _current_graph_task_id()
        backward = self._backward()
        if backward is None or backward.task != task or call.inside != -1:
            backward = self._begin(call, task, backward)
        backward.admit(call)
        return backward

    def _begin(self, call: LayerCall, task: int, earlier: Backward | None) -> Backward:
        self._check_start(call, task)
        if earlier is not None:
            self._unfinished.add(earlier.task)
        # Rules that wait for the end would find shards in the place of parameters.
        kept = 0 if self.parameters.is_sharded else self.options.kept
        backward = Backward(task, call.batch_size, self.sink, kept)
        self._backward = weakref.ref(backward)
        self.native.begin_backward(backward.collector)
        self.sink.begin(call.batch_size)
        queue = torch.autograd.Variable._execution_engine.queue_callback
        end = partial(self._end, backward)
        # Queued once more to run last: FSDP's callback, which reshards the parameters, may be queued after this one.
        queue(partial(queue, end) if self.parameters.is_sharded else end)
        return backward

    def _check_start(self, call: LayerCall, task: int) -> None:
        if task in self._unfinished:
            raise RuntimeError(NESTED)
        if call.parameters:  # else it is a call of a process whose part of the batch is empty
            check_not_empty(call.batch_size, call.name)
        if self.native.pauses:
            raise RuntimeError(
                f"the forward of '{call.name}' was recorded, but its backward runs"
                f" {'after handle.remove()' if self._is_removed else 'under handle.paused()'}: put both on one side"
            )
        if call.inside != -1:
            raise RuntimeError(reentrant_message(call))

    def _end(self, backward: Backward) -> None:
        if self._backward() is not backward:
            raise RuntimeError(NESTED)
        self._backward = _nothing
        if not self.is_proving:
            self.calls.end(backward.batch_size)
        if backward.sink.writes and self.options.batch_dim is None:
            self.calls.warn_of_only_sample()
        backward.finish()

    def _refuse_outside(self, parameter: nn.Parameter) -> None:
        """Raise for a gradient that reaches `parameter` past the capture, unless paused."""
        if self.native.pauses:
            return
        name = self.parameters.name_of(parameter)
        if self.derivatives is not None:
            raise InnerDerivative(OUTSIDE.format(name, tuple(parameter.shape)))
        raise RuntimeError(
            f"parameter '{name}' of shape {tuple(parameter.shape)} got gradient outside the forward of its module,"
            " which cannot be told apart by sample. If another module uses it (F.linear(x, other.weight)), give that"
            " module the parameter as its own, or capture the enclosing module as one unit with"
            " rgd_ext.register_rule(enclosing, rgd_ext.unit); if another method of its module uses it, call that from"
            " forward, and the module in its place; for a penalty on weights use weight_decay, or a"
            " backward of its own under `with handle.paused():`"
        )


def reentrant_message(call: LayerCall) -> str:
    """The message for a forward that ran inside a backward."""
    return (
        f"the forward of '{call.name}' ran inside a backward, as in re-entrant checkpointing, which hides when a"
        " backward ends. In the place of use_reentrant=True, or of a checkpoint function of your own, call"
        " torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)"
    )


def _nothing() -> None:
    """No backward is under way."""
