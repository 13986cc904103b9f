"""One backward through a captured model: what its layers hand over, until it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..contributions.cost import SHARE
from ..contributions.factor import Dense, Factor
from ..contributions.ledger import Contributions
from ..contributions.vectors import VectorLayers
from .native import NODES_ASK, Collector, LayerCall, vector_buckets
from .precision import full_precision
from .rule_output import RuleOutput, apply_rule, checked, missing_error
from .sinks import CallNumbers, Sink

# The most bytes of inputs and output gradient of a small layer, which waits for the end of the backward. In the middle
# of it the code of a rule is not in the caches, which costs a convolution 40 us, as measured; larger tensors would
# leave the caches while they wait.
SMALL = 64 << 10
_ONE_BY_ONE = (
    "Use one backward per batch, under `with handle.accumulate():` for one direction from all; and bags (B, T), filled"
    " up with padding_idx, where an nn.EmbeddingBag got offsets and another layer the same indices"
)
_AS_TUPLE = "Return the residuals of calls with different batches as a tuple, (interior, boundary)"


class Backward:
    """What the layers have handed over in one backward, from the first layer on. It is thrown away whole.

    Args:
        task: the task of autograd's engine.
        batch_size: the number of samples, which all layers share.
        sink: what the backward is for.
        max_waiting: how many bytes the small layers may hold that wait for the end.

    Attributes:
        task, batch_size, sink: as given.
        collector: takes layers without a line of Python for each.
    """

    __slots__ = (
        "__weakref__",
        "_asks",
        "_contributions",
        "_max_waiting",
        "_passed",
        "_sends_early",
        "_uses",
        "_waiting",
        "_waiting_bytes",
        "batch_size",
        "collector",
        "sink",
        "task",
    )

    def __init__(self, task: int, batch_size: int, sink: Sink, max_waiting: int) -> None:
        self.task, self.batch_size, self.sink = task, batch_size, sink
        # With the task -1 it takes nothing by itself: contributions that are kept need the copies that `receive` makes,
        # and those that are sent early do not wait for the end.
        self._sends_early = sink.sends_early
        task_of_collector = -1 if sink.keeps_contributions or self._sends_early else task
        self.collector = Collector(task_of_collector, batch_size, SMALL, max_waiting, SHARE)
        # Whether the collector has to be asked here: compiled nodes ask it themselves, but for the first layer.
        self._asks = True
        self._contributions = Contributions(batch_size)
        self._passed: CallNumbers = set()
        self._uses: dict[nn.Parameter, list[Factor]] = {}
        self._waiting: list[tuple[LayerCall, Collection[str], Sequence[Tensor], Tensor]] = []
        self._max_waiting, self._waiting_bytes = max_waiting, 0

    def admit(self, call: LayerCall) -> None:
        """Note the call of the model that a layer was part of; ValueError if the layer had another batch size."""
        if self.sink.keeps_contributions:
            self._passed.add((call.number, call.batch_size))
        if call.batch_size != self.batch_size:
            is_of_residuals = call.context.derivatives is not None
            raise ValueError(
                f"batch sizes disagree in one backward: '{call.name}' ran with {call.batch_size} samples, modules"
                f" before it with {self.batch_size}. {_AS_TUPLE if is_of_residuals else _ONE_BY_ONE}"
            )

    def receive(self, call: LayerCall, names: Collection[str], inputs: Sequence[Tensor], grad: Tensor) -> None:
        """Take what a layer gets in the backward, for some of its parameters.

        Args:
            call: the layer's call in the forward.
            names: the names of the parameters whose gradients are wanted.
            inputs: the tensors that the layer was called with.
            grad: the gradient of its output.
        """
        if self.sink.keeps_contributions:
            # They must not change with a buffer that the next batch is copied to, nor hold a graph.
            inputs, grad = [x.clone() if x.grad_fn is None else x.detach() for x in inputs], grad.clone()
        is_whole, is_urgent = len(names) == len(call.parameters), self._is_urgent(call)
        if is_whole and not is_urgent and (self._asks or call.operands is not None):
            is_taken = self._takes_without_rule(call, inputs[0], grad)
            self._asks = self.sink.keeps_contributions or self._sends_early or not NODES_ASK
            if is_taken:
                return
        size = grad.nbytes + sum([x.nbytes for x in inputs])
        if not is_urgent and size <= SMALL and self._waiting_bytes + size <= self._max_waiting:
            self._waiting.append((call, names, inputs, grad))
            self._waiting_bytes += size
            return
        with full_precision(grad.device):
            self.contribute(call, names, apply_rule(call, inputs, grad))

    def _is_urgent(self, call: LayerCall) -> bool:
        """Whether the layer has a parameter whose contributions are to be offered now."""
        return self._sends_early and any(map(self.sink.takes_early, call.parameters.values()))

    def _takes_without_rule(self, call: LayerCall, x: Tensor, grad: Tensor) -> bool:
        """Take a layer whose parameters are all wanted without calling its rule; returns whether it was taken."""
        if self._asks and (self.collector.take_vectors(call, x, grad) or self.collector.take_small(call, x, grad)):
            return True
        operands = call.operands
        if operands is None or grad.ndim != 2:
            return False
        parameter: Any = call.parameters["weight"]
        if not x.dtype == grad.dtype == parameter.dtype:
            return False
        x, e = operands(x, grad)
        bias = [call.parameters[name] for name in ("bias",) if name in call.parameters]
        self._contributions.add_vectors([*bias, parameter], VectorLayers([x], [e], [bool(bias)]))
        return True

    def contribute(self, call: LayerCall, names: Collection[str], found: RuleOutput) -> None:
        """Enter the contributions of a layer to the parameters of these names."""
        for name in names:
            factor, parameter = found.get(name), call.parameters[name]
            if isinstance(factor, Tensor):
                tensor = checked(call, name, factor)
                self._contributions.add_tensor([parameter], tensor)
                entered: Factor = Dense(tensor)
            elif factor is not None:
                entered = self.sink.apply(parameter, factor)
                self._contributions.add_factor(parameter, entered)
            else:
                raise missing_error(call, found)
            if self._sends_early and self.sink.takes_early(parameter):
                self.sink.offer(parameter, entered)

    def add_use(self, parameter: nn.Parameter, factor: Factor) -> None:
        """Enter the contributions of one of several uses of a parameter, whose strategy is chosen for their sum."""
        self._uses.setdefault(parameter, []).append(factor)

    def finish(self) -> None:
        """End the backward."""
        self._gather()
        self.sink.finish(self._contributions, self._passed)

    def _gather(self) -> None:
        """Enter what has waited for the end. Nothing here may hold it afterwards, or it would outlive its last use."""
        waiting, self._waiting = self._waiting, []
        with ExitStack() as stack:
            for device in {grad.device for *_, grad in waiting}:
                stack.enter_context(full_precision(device))
            for call, names, inputs, grad in waiting:
                self.contribute(call, names, apply_rule(call, inputs, grad))
        contributions = self._contributions
        uses, self._uses = self._uses, {}
        for parameter, factors in uses.items():
            contributions.add_factor(parameter, self.sink.total(parameter, factors))
        for parameters, matrix in self.collector.gradients():
            contributions.add_tensor(parameters, matrix)
        for parameters, layers in vector_buckets(self.collector):
            contributions.add_vectors(parameters, layers)
