"""Taps: forwards of modules that keep what a layer rule needs, and hand it to the capture in the backward.

A tap sits in the place of its module's `forward`. It calls the real one with detached parameters, so that autograd
computes no weight gradient, and ties the output to the parameters through an autograd node whose backward has the
layer's rule called.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._binary import _C
from ..batch_norm import batch_norms, check_frozen
from .batch import NESTED, Batch, arrays_in, check_not_empty, mark_of, tensors_in
from .factors import Factor
from .nodes import BoundRule, Record, spread, watch
from .rules import KINDS, Registered
from .shared import Shared, share
from .substitute import Substitute
from .sums import merge
from .wrappers import check_not_sharded

if TYPE_CHECKING:
    from .preconditioner import Preconditioner

_EAGER = (
    "a captured model (rgd_ext) runs uncompiled: call torch.compile without fullgraph=True, or on a copy,"
    " copy.deepcopy(model)"
)
# A parameter's place: the module that owns it, its name there, and its name in the tapped module.
Slot = tuple[nn.Module, str, str]


class Tap(Substitute):
    """A module's forward while its model is captured. Subclasses say how the forward is recorded.

    The outermost tap of a call, the model's as a rule, is where the batch comes in.

    Small models wait for what runs here once per layer and step: it is written for few operations.
    """

    batch_norms: Mapping[str, nn.Module] = MappingProxyType({})
    # The dimension of the samples in its inputs, where that is another than in the model's.
    at: int | None = None
    # (tap, args, Record) -> the watched output, or None where the case is not the usual one.
    run_usual: Callable | None = None

    def __init__(self, capture: Preconditioner, module: nn.Module, name: str, slots: list[Slot]) -> None:
        super().__init__(module)
        self.capture, self.slots = capture, slots
        self.name = name or type(module).__name__

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs)
        if self.run_usual is not None and not kwargs:
            output = self.run_usual(self, args, Record)
            if output is not None:
                return output
        capture = self.capture
        if not capture.recording():
            return self.original(*args, **kwargs)
        if capture.batch is None:
            return capture.call(self, args, kwargs)
        return self.recorded(args, kwargs)

    def take_time_first(self) -> None:
        """From now on inputs are (T, B, ...), whatever those of the model are."""
        self.at, self.run_usual = 1, None

    def _compiled(self, args: tuple, kwargs: dict):
        """What torch.compile and torch.export make of a captured model: the first has it run eagerly."""
        if torch.compiler.is_exporting():
            return self.original(*args, **kwargs)
        torch._dynamo.graph_break(msg=_EAGER)
        return torch.compiler.disable(self)(*args, **kwargs)

    def check_batch_norm(self) -> None:
        """Raise ValueError if the module would couple the samples."""

    def recorded(self, args: tuple, kwargs: dict):
        """The forward, in a call of the model that is under way."""
        if self.batch_norms:
            self.check_batch_norm()
        parameters = self._trainable()
        if not parameters:
            return self.original(*args, **kwargs)
        return self.record(self.capture.batch, parameters, args, kwargs)

    def record(self, batch: Batch, parameters: dict[str, nn.Parameter], args: tuple, kwargs: dict):
        """The forward, with `parameters` watched."""
        return self.original(*args, **kwargs)

    def sized(self, batch: Batch, args: tuple, kwargs: dict) -> Batch:
        """`batch`, or that in the arguments of the module where those of the model do not tell its size.

        Raises:
            ValueError: if the module is marked as shared by all samples, so that its arguments do not either.
        """
        if batch.size is not None:
            return batch
        at = mark_of(self.module, batch.at)
        if at is None:
            raise ValueError(
                f"module '{self.name}' is marked as shared by all samples, but the batch size is unknown: call the"
                " captured model itself, with the batch as its first tensor"
            )
        return Batch.among(arrays_in(args, kwargs), batch.model, at)

    def _trainable(self) -> dict[str, nn.Parameter]:
        parameters, guards = {}, self.capture.guards
        for owner, key, name in self.slots:
            parameter = owner._parameters.get(key)
            if parameter is None:
                self._check_place(owner, key, name)
                continue
            if not parameter.requires_grad:
                continue
            if id(parameter) not in guards:
                # What is no Parameter was put there by torch.func.functional_call, which differentiates it itself.
                if not isinstance(parameter, nn.Parameter):
                    check_not_sharded(self.module)
                    continue
                self.capture.guard(parameter)
            parameters[name] = parameter
        return parameters

    def _check_place(self, owner: nn.Module, key: str, name: str) -> None:
        if key not in owner._parameters:
            check_not_sharded(self.module)
            raise ValueError(
                f"parameter '{name}' of module '{self.name}' is gone since the capture, so what took its place would"
                " get its plain gradient: call .remove() on the handle and capture the model again"
            )

    @contextmanager
    def _replaced(self, values: dict[str, Tensor]):
        places = [(owner._parameters, key, values[name]) for owner, key, name in self.slots if name in values]
        saved = [parameters[key] for parameters, key, _ in places]
        for parameters, key, value in places:
            parameters[key] = value
        try:
            yield
        finally:
            for (parameters, key, _), parameter in zip(places, saved, strict=True):
                parameters[key] = parameter

    def _spread(self, parameters: dict[str, nn.Parameter], batch_size: int) -> dict[str, Tensor]:
        return spread(Record(self.capture, self.name, parameters, batch_size))

    def _make_record(
        self, batch_size: int, parameters: dict[str, nn.Parameter], rule: BoundRule, kind: str | None = None
    ) -> Record:
        return Record(self.capture, self.name, parameters, batch_size, rule, kind)

    def _for_one(self, parameters: dict[str, nn.Parameter], forward: Callable, args: tuple, kwargs: dict):
        """`forward` in a call for one sample, with its copy of the parameters."""
        # In memory of their own: a view of the parameters could not be changed in place.
        copies = {name: copy[0].clone() for name, copy in self._spread(parameters, 1).items()}
        with self._replaced(copies):
            output = forward(*args, **kwargs)
        keep_changes(parameters, copies)
        return output

    def _watch(
        self,
        parameters: dict[str, nn.Parameter],
        batch_size: int,
        rule: BoundRule,
        output: Tensor,
        inputs: tuple[Tensor, ...],
        kind: str | None = None,
    ) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"module '{self.name}' ({type(self.module).__name__}) gives a {type(output).__name__}: rules serve"
                " modules with one output tensor; register it with rgd_ext.unit instead"
            )
        return watch(self._make_record(batch_size, parameters, rule, kind), output, inputs)


class Container(Tap):
    """A module with parameters of its own and children with theirs: its own are shared by the samples."""

    def record(self, batch, parameters, args, kwargs):
        batch = self.sized(batch, args, kwargs)
        if batch.size is None:
            raise ValueError(
                f"module '{self.name}' uses its own parameters but was called without a tensor, so the batch size is"
                " unknown; call the captured model itself, with the batch as its first tensor"
            )
        check_not_empty(batch.size, self.name)
        spread = self._spread(parameters, batch.size)
        use = partial(self._make_record, batch.size)
        shared = {
            name: share(copies, f"{self.name}.{name}", batch, parameters[name], use) for name, copies in spread.items()
        }
        with self._replaced(shared):
            output = self.original(*args, **kwargs)
        self._keep_buffers()
        return output

    def _keep_buffers(self) -> None:
        """Buffers that were computed from parameters are ordinary tensors again."""
        for name, buffer in self.module._buffers.items():
            if isinstance(buffer, Shared):
                if buffer.value.tensor.requires_grad:
                    raise ValueError(
                        f"module '{self.name}' ({type(self.module).__name__}) gives '{name}', a buffer, a value that"
                        " depends on parameters and has a gradient: detach it"
                    )
                self.module._buffers[name] = buffer.value.tensor


class Layer(Tap):
    """A module with a rule."""

    def __init__(self, capture, module, name, slots, registered: Registered) -> None:
        super().__init__(capture, module, name, slots)
        self.sample_ndim, self.at = registered.minimum(module), registered.at
        self._bound_rule = partial(registered.rule, module)
        is_plain = {name for *_, name in slots} <= {"weight", "bias"}
        self._kind = KINDS.get(id(registered.rule)) if is_plain else None
        self.batch_norms = batch_norms(module, name)
        if _C is not None and not self.batch_norms and capture.batch_dim == 0:
            self.run_usual = _C.run_layer

    def check_batch_norm(self):
        if self.capture.batch_norm == "error":
            check_frozen(self.batch_norms)

    def record(self, batch, parameters, args, kwargs):
        inputs = args
        if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
            inputs = tuple(tensors_in(self._in_order(args, kwargs)))
            if not inputs:
                raise ValueError(f"module '{self.name}' was called without a tensor: its rule has nothing to work on")
            if any(isinstance(x, Shared) for x in inputs):
                return self._of_shared(parameters, inputs, args, kwargs)
        if any(x.is_nested for x in inputs):
            raise TypeError(f"module '{self.name}' got {NESTED}")
        if any(x.layout != torch.strided for x in inputs):
            inputs = tuple(x.to_dense() for x in inputs)  # rules know strides only
        if batch.at is None:
            return self._rows_of_one(parameters, inputs, args, kwargs)
        first = inputs[0]
        dim = batch.dim(first, self.module, self.name, self.sample_ndim, at=self.at)
        output = self._output(parameters, args, kwargs)
        if dim is None:
            return self._for_all(parameters, batch, inputs, output)
        size, rule = batch.size_of(first, dim, self.name), self._rule_as_of_now()
        if dim == 0:
            return self._watch(parameters, size, rule, output, inputs, self._kind)
        return self._watch(parameters, size, partial(_moved, rule, dim), output, inputs)

    def _rows_of_one(self, parameters, inputs, args, kwargs) -> Tensor:
        """A call for one sample, whatever its rows are."""
        output = self._output(parameters, args, kwargs)
        if inputs[0].numel() == 0:  # an expert that nothing chose
            return output
        return self._watch(parameters, 1, partial(merged, self._rule_as_of_now(), self.sample_ndim), output, inputs)

    def _in_order(self, args: tuple, kwargs: dict) -> list[object]:
        """All arguments, as the forward declares them."""
        arguments = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs).arguments
        return list(arguments.values())[1:]

    def _output(self, parameters: dict[str, nn.Parameter], args: tuple, kwargs: dict) -> Tensor:
        """The forward, of which autograd will compute no weight gradient."""
        for parameter in parameters.values():
            parameter.requires_grad = False
        try:
            return self.original(*args, **kwargs)
        finally:
            for parameter in parameters.values():
                parameter.requires_grad = True

    def _of_shared(self, parameters, inputs, args, kwargs) -> Tensor:
        """Inputs that differ between the samples only in whose copy they are: run on the copies."""
        if len(inputs) > 1 or kwargs:
            raise ValueError(
                f"module '{self.name}' got a value shared by all samples among several inputs; capture the enclosing"
                " module as one unit with rgd_ext.register_rule(enclosing, rgd_ext.unit)"
            )
        first = inputs[0]
        squeezed = first.ndim > self.sample_ndim and first.shape[0] == 1
        copies = first.copies.squeeze(1) if squeezed else first.copies
        output = self._output(parameters, (copies, *args[1:]), {})
        output = self._watch(parameters, copies.shape[0], self._rule_as_of_now(), output, (copies,))
        return share(output.unsqueeze(1) if squeezed else output, self.name, first.batch)

    def _for_all(self, parameters, batch: Batch, inputs, output: Tensor) -> Tensor:
        """An input without a batch: computed once, its gradient taken per sample."""
        batch_size = batch.size
        if batch_size is None:
            raise ValueError(
                f"module '{self.name}' has an input that all samples share, but the batch size is unknown: call the"
                " captured model itself, with the batch as its first tensor"
            )
        squeezed = inputs[0].ndim > self.sample_ndim and inputs[0].shape[0] == 1

        bound = self._rule_as_of_now()

        def rule(saved: tuple[Tensor, ...], grad: Tensor):
            expanded = [(x if squeezed else x[None]).expand(batch_size, *x.shape[squeezed:]) for x in saved]
            return bound(tuple(expanded), grad.squeeze(1) if squeezed else grad)

        return share(
            self._watch(parameters, batch_size, rule, output.expand(batch_size, *output.shape), inputs),
            self.name,
            batch,
        )

    def _rule_as_of_now(self) -> BoundRule:
        """The rule for this forward: buffers and mode may change before the backward."""
        if not self.module._buffers:
            return self._bound_rule
        module = copy.copy(self.module)
        module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        return partial(self._bound_rule.func, module)


@torch.no_grad()
def keep_changes(parameters: Mapping[str, nn.Parameter], copies: Mapping[str, Tensor]) -> None:
    """Give parameters the values that a forward gave their copies in place."""
    for name, copy_ in copies.items():
        if not torch.equal(copy_, parameters[name]):  # changes of `copy_.data` leave its version as it is
            parameters[name].copy_(copy_)


def merged(rule: BoundRule, sample_ndim: int, inputs: tuple[Tensor, ...], grad: Tensor) -> dict[str, Tensor | Factor]:
    """What all rows of `inputs` contribute, or `inputs` itself if it is one row, as that of one sample."""
    if inputs[0].ndim <= sample_ndim:
        inputs, grad = tuple(x[None] for x in inputs), grad[None]
    return {name: merge(rows) for name, rows in rule(inputs, grad).items()}


def _moved(rule: BoundRule, dim: int, inputs: tuple[Tensor, ...], grad: Tensor) -> dict[str, Tensor | Factor]:
    return rule(tuple(x.movedim(dim, 0) for x in inputs), grad.movedim(dim, 0))
