"""The base class of recorders.

A recorder sits in the place of its module's `forward`. It calls the original forward with frozen parameters, so that
autograd computes no gradient of them. Then it ties the output to the parameters by an autograd node, which in the
backward hands the inputs and the output gradient of the layer to the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ...nests import arrays_in
from ..batch import Batch
from ..context import CaptureContext
from ..marks import mark_of
from ..native import LayerCall
from ..nodes import parameter_copies, watch
from ..rule_output import BoundRule
from ..wrappers import check_not_sharded
from .substitute import ForwardSubstitute

_EAGER = (
    "a captured model (rgd_ext) runs uncompiled: call torch.compile without fullgraph=True, or on a copy,"
    " copy.deepcopy(model)"
)
# A parameter's place (the module that owns it, and its name there) and its name in the recorded module.
NamedPlace = tuple[nn.Module, str, str]


class Recorder(ForwardSubstitute):
    """Runs and records the forward of a module while its model is captured. Subclasses define how it is recorded.

    The outermost recorder of a call, as a rule that of the model, starts a call of the model, which has the batch.

    The code here runs once per layer and step, and small models wait for it, so it takes as few operations as possible.

    Args:
        context: the capture.
        module, name: the module and its name in the model.
        places: the places of the parameters that the recorder serves.

    Attributes:
        batch_norms: the layers of batch normalisation in the module, by name.
        batch_dim: the dimension of the samples in its inputs, or None if it is that of the model's inputs.
    """

    batch_norms: Mapping[str, nn.Module] = MappingProxyType({})
    batch_dim: int | None = None

    def __init__(self, context: CaptureContext, module: nn.Module, name: str, places: list[NamedPlace]) -> None:
        super().__init__(module)
        self.context, self.places = context, places
        self.name = name or type(module).__name__

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self._run_in_compiler(args, kwargs)
        context = self.context
        if not context.native.is_recording():
            return self.original(*args, **kwargs)
        if context.calls.batch is None:
            return context.enter(self, args, kwargs)
        return self.run(args, kwargs)

    def expect_time_first(self) -> None:
        """Take inputs as (T, B, ...), whatever those of the model are."""
        self.batch_dim = 1

    def _run_in_compiler(self, args: tuple, kwargs: dict):
        """The forward inside of torch.export, which traces it, or of torch.compile, where it runs eagerly."""
        # What is_exporting() returns; Dynamo of torch 2.11 takes the function for true wherever it traces.
        if torch.compiler._is_exporting_flag:
            return self.original(*args, **kwargs)
        torch._dynamo.graph_break(msg=_EAGER)
        return torch.compiler.disable(self)(*args, **kwargs)

    def check_batch_norm(self) -> None:
        """Raise ValueError if the module would couple the samples."""

    def run(self, args: tuple, kwargs: dict):
        """The output of the forward in the call of the model that is under way; recorded if it has parameters."""
        if self.batch_norms:
            self.check_batch_norm()
        parameters = self._trainable()
        if not parameters:
            return self.original(*args, **kwargs)
        return self.record(self.context.calls.batch, parameters, args, kwargs)

    def record(self, batch: Batch, parameters: dict[str, nn.Parameter], args: tuple, kwargs: dict):
        """The output of the forward, tied to the trainable `parameters`."""
        return self.original(*args, **kwargs)

    def batch_with_size(self, batch: Batch, args: tuple, kwargs: dict) -> Batch:
        """`batch`, or the batch in the arguments of the module if the arguments of the model do not tell its size.

        Raises:
            ValueError: if the module is marked as shared by all samples, so that its arguments do not either.
        """
        if batch.size is not None:
            return batch
        batch_dim = mark_of(self.module, batch.batch_dim)
        if batch_dim is None:
            raise ValueError(
                f"module '{self.name}' is marked as shared by all samples, but the batch size is unknown: call the"
                " captured model itself, with the batch as its first tensor"
            )
        return Batch.among(arrays_in(args, kwargs), batch.model, batch_dim)

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name; those that are new are watched from now on."""
        parameters, watched = {}, self.context.parameters
        for owner, key, name in self.places:
            parameter = owner._parameters.get(key)
            if parameter is None:
                self._check_place(owner, key, name)
                continue
            if not parameter.requires_grad:
                continue
            if parameter not in watched:
                # What is no Parameter was put there by torch.func.functional_call, which differentiates it itself.
                if not isinstance(parameter, nn.Parameter):
                    check_not_sharded(self.module)
                    continue
                watched.watch(parameter)
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
    def _reparametrized(self, values: dict[str, Tensor]):
        """The module has `values`, by name, in the places of its parameters."""
        places = [(owner._parameters, key, values[name]) for owner, key, name in self.places if name in values]
        saved = [parameters[key] for parameters, key, _ in places]
        for parameters, key, value in places:
            parameters[key] = value
        try:
            yield
        finally:
            for (parameters, key, _), parameter in zip(places, saved, strict=True):
                parameters[key] = parameter

    def _make_call(
        self,
        parameters: dict[str, nn.Parameter],
        batch_size: int,
        rule: BoundRule | None = None,
        spec: object = None,
        operands: Callable | None = None,
    ) -> LayerCall:
        """A call of a layer with some parameters of the module, in the forward that runs now.

        Args:
            parameters: the parameters, by their names in the rule.
            batch_size: B.
            rule: (inputs, output gradient) -> contributions, batch first.
            spec: the spec, from `native_spec`, of a layer with samples along dimension 0 that compiled code may take.
            operands: (x, output gradient) -> the input and the output gradient of an nn.Linear with the same
                contributions, if there is one.
        """
        context = self.context
        return LayerCall(context, context.native, self.name, parameters, batch_size, rule, spec, operands)

    def _copies(self, parameters: dict[str, nn.Parameter], batch_size: int) -> dict[str, Tensor]:
        """A copy of each parameter per sample, (B, *shape), by name."""
        return parameter_copies(self._make_call(parameters, batch_size))

    def _run_with_copies(self, parameters: dict[str, nn.Parameter], forward: Callable, args: tuple, kwargs: dict):
        """The output of `forward` for the only sample of a call, with its copy of the parameters."""
        # The copies have memory of their own, since a view of the parameters could not be changed in place.
        copies = {name: copy[0].clone() for name, copy in self._copies(parameters, 1).items()}
        with self._reparametrized(copies):
            output = forward(*args, **kwargs)
        write_back(parameters, copies)
        return output

    def _watch(self, call: LayerCall, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """`output`, tied to the parameters of `call`."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"module '{self.name}' ({type(self.module).__name__}) gives a {type(output).__name__}: rules serve"
                " modules with one output tensor; register it with rgd_ext.unit instead"
            )
        return watch(call, output, inputs)


@torch.no_grad()
def write_back(parameters: Mapping[str, nn.Parameter], copies: Mapping[str, Tensor]) -> None:
    """Give parameters the values that a forward gave to their copies in place."""
    for name, copy_ in copies.items():
        if not torch.equal(copy_, parameters[name]):  # changes of `copy_.data` leave its version as it is
            parameters[name].copy_(copy_)
