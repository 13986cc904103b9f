"""The recorder of modules that have a layer rule."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...batch_norm import batch_norms, check_frozen
from ...contributions.factor import Factor
from ...contributions.merge import as_one_sample
from ...layers.registry import LayerType
from ...layers.spec import LINEAR
from ...nests import tensors_in
from ..batch import NESTED, Batch
from ..marks import is_marked
from ..native import layer as compiled_layer
from ..native import native_spec
from ..rule_output import BoundRule
from ..values.shared_tensor import SharedTensor, shared_tensor
from .recorder import Recorder


class LayerRecorder(Recorder):
    """Records a module that has a rule, which gives the contributions in the backward.

    Compiled code (csrc/python/layer.cpp) runs the forward in the usual case: for one tensor that carries a gradient,
    with the samples along dimension 0. What follows here is for all other cases.
    """

    def __init__(self, context, module, name, places, layer_type: LayerType) -> None:
        super().__init__(context, module, name, places)
        self.sample_ndim, self.batch_dim = layer_type.minimum(module), layer_type.at
        self._layer_type = layer_type
        self._spec = layer_type.spec_of(module)
        self.batch_norms = batch_norms(module, name)
        self._compiled = self._compiled_layer()

    @property
    def _bound_rule(self) -> BoundRule:
        """The rule of the module as it is now."""
        return partial(self._layer_type.rule, self.module)

    def _compiled_layer(self) -> tuple[Any, dict[str, nn.Parameter | None]] | None:
        """The compiled layer for the usual case, and the dictionary that it takes the parameters from.

        None where the usual case never comes, or there is no compiled code.
        """
        has_samples_first = self.context.options.batch_dim == 0 and self.batch_dim in (None, 0)
        has_own_parameters = all(owner is self.module for owner, *_ in self.places)
        if self.batch_norms or not has_samples_first or not has_own_parameters or self.previous is not None:
            return None
        parameters, spec = self.module._parameters, native_spec(self._spec)
        places = [(parameters, key, name) for _, key, name in self.places]
        layer = compiled_layer(
            self.context, self.context.native, self.name, places, self._bound_rule, spec, self.sample_ndim
        )
        return None if layer is None else (layer, parameters)

    def _update_spec(self) -> None:
        """Take over what the user has changed in a norm, such as its eps, since the forward before."""
        spec = self._layer_type.spec_of(self.module)
        if spec != self._spec:
            self._spec = spec
            self._compiled = self._compiled_layer()

    def __call__(self, *args, **kwargs):
        module, spec = self.module, self._spec
        attributes = module.__dict__
        if spec is not None and spec is not LINEAR:
            dimensions = len(attributes.get("normalized_shape", (0,)))
            settings = attributes.get("eps"), attributes.get("num_groups", 1), dimensions
            if settings != (spec.eps, spec.groups, 1):
                self._update_spec()
        compiled = self._compiled
        is_usual = compiled is not None and len(args) == 1 and not kwargs and not torch.compiler.is_compiling()
        # Buffers may change before the backward, a mark says where the samples are, and the module may have got another
        # dictionary of parameters, as from __setstate__.
        is_usual = is_usual and not attributes["_buffers"] and not is_marked(module)
        if is_usual and compiled[1] is attributes["_parameters"]:
            output = compiled[0].run(module, type(module).forward, args[0])
            if type(output) is tuple:
                return self._watch(output[0], output[1], args)
            if output is not None:
                return output
        return super().__call__(*args, **kwargs)

    def expect_time_first(self) -> None:
        super().expect_time_first()
        self._compiled = self._compiled_layer()

    def check_batch_norm(self):
        if self.context.options.batch_norm == "error":
            check_frozen(self.batch_norms)

    def record(self, batch, parameters, args, kwargs):
        inputs = args
        if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
            inputs = tuple(tensors_in(self._ordered(args, kwargs)))
            if not inputs:
                raise ValueError(f"module '{self.name}' was called without a tensor: its rule has nothing to work on")
            if any(isinstance(x, SharedTensor) for x in inputs):
                return self._run_on_copies(parameters, inputs, args, kwargs)
        if any(x.is_nested for x in inputs):
            raise TypeError(f"module '{self.name}' got {NESTED}")
        if any(x.layout != torch.strided for x in inputs):
            inputs = tuple(x.to_dense() for x in inputs)  # rules take strided tensors only
        if batch.batch_dim is None:
            return self._record_one_sample(parameters, inputs, args, kwargs)
        first = inputs[0]
        dim = batch.dim(first, self.module, self.name, self.sample_ndim, batch_dim=self.batch_dim)
        output = self._run_frozen(parameters, args, kwargs)
        if dim is None:
            return self._shared_output(parameters, batch, inputs, output)
        size, rule = batch.checked_size(first, dim, self.name), self._current_rule()
        if dim == 0:
            return self._watch(self._make_call(parameters, size, rule, native_spec(self._spec)), output, inputs)
        return self._watch(self._make_call(parameters, size, partial(_moved, rule, dim)), output, inputs)

    def _record_one_sample(self, parameters, inputs, args, kwargs) -> Tensor:
        """The forward in a call of the model for one sample, to which all rows of the inputs belong then."""
        output = self._run_frozen(parameters, args, kwargs)
        if inputs[0].numel() == 0:  # as of an expert that no token was sent to
            return output
        rule = partial(merged, self._current_rule(), self.sample_ndim)
        return self._watch(self._make_call(parameters, 1, rule), output, inputs)

    def _ordered(self, args: tuple, kwargs: dict) -> list[object]:
        """The values of all arguments, in the order in which the forward declares them."""
        arguments = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs).arguments
        return list(arguments.values())[1:]

    def _run_frozen(self, parameters: dict[str, nn.Parameter], args: tuple, kwargs: dict) -> Tensor:
        """The output of the forward with frozen parameters, of which autograd computes no gradient."""
        for parameter in parameters.values():
            parameter.requires_grad = False
        try:
            return self.original(*args, **kwargs)
        finally:
            for parameter in parameters.values():
                parameter.requires_grad = True

    def _run_on_copies(self, parameters, inputs, args, kwargs) -> Tensor:
        """The forward for a shared tensor, which runs on its copies, one for each sample."""
        if len(inputs) > 1 or kwargs:
            raise ValueError(
                f"module '{self.name}' got a value shared by all samples among several inputs; capture the enclosing"
                " module as one unit with rgd_ext.register_rule(enclosing, rgd_ext.unit)"
            )
        first = inputs[0]
        squeezed = first.ndim > self.sample_ndim and first.shape[0] == 1
        copies = first.copies.squeeze(1) if squeezed else first.copies
        output = self._run_frozen(parameters, (copies, *args[1:]), {})
        output = self._watch(self._make_call(parameters, copies.shape[0], self._current_rule()), output, (copies,))
        return shared_tensor(output.unsqueeze(1) if squeezed else output, self.name, first.batch)

    def _shared_output(self, parameters, batch: Batch, inputs, output: Tensor) -> Tensor:
        """The output for inputs that all samples share: computed once, with a gradient per sample."""
        batch_size = batch.size
        if batch_size is None:
            raise ValueError(
                f"module '{self.name}' has an input that all samples share, but the batch size is unknown: call the"
                " captured model itself, with the batch as its first tensor"
            )
        squeezed = inputs[0].ndim > self.sample_ndim and inputs[0].shape[0] == 1
        bound = self._current_rule()

        def rule(saved: tuple[Tensor, ...], grad: Tensor):
            expanded = [(x if squeezed else x[None]).expand(batch_size, *x.shape[squeezed:]) for x in saved]
            return bound(tuple(expanded), grad.squeeze(1) if squeezed else grad)

        copies = output.expand(batch_size, *output.shape)
        return shared_tensor(
            self._watch(self._make_call(parameters, batch_size, rule), copies, inputs), self.name, batch
        )

    def _current_rule(self) -> BoundRule:
        """The rule, with the module as it is in this forward: its buffers and mode may change before the backward."""
        if not self.module._buffers:
            return self._bound_rule
        module: Any = object.__new__(type(self.module))  # copy.copy would call __init__ where fully_shard was applied
        vars(module).update(vars(self.module))
        module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        return partial(self._layer_type.rule, module)


def merged(rule: BoundRule, sample_ndim: int, inputs: tuple[Tensor, ...], grad: Tensor) -> dict[str, Tensor | Factor]:
    """The contributions of all rows of `inputs` together, as those of one sample.

    `inputs` may be a single row, without a dimension of rows.
    """
    if inputs[0].ndim <= sample_ndim:
        inputs, grad = tuple(x[None] for x in inputs), grad[None]
    return {name: as_one_sample(rows) for name, rows in rule(inputs, grad).items()}


def _moved(rule: BoundRule, dim: int, inputs: tuple[Tensor, ...], grad: Tensor) -> dict[str, Tensor | Factor]:
    """The contributions for inputs and output gradients with the samples along `dim`."""
    return rule(tuple(x.movedim(dim, 0) for x in inputs), grad.movedim(dim, 0))
