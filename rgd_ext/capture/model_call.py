"""Calls of a captured model from outside of its forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch._C import _current_graph_task_id

from ..nests import arrays_in, tensors_in
from .batch import AS_UNIT, Batch, batch_size, is_list
from .context import CaptureContext
from .recorders.recorder import Recorder
from .values.shared_tensor import SharedTensor


class ModelCall(NamedTuple):
    """A call of a captured model, or of a part of it, from outside.

    Attributes:
        recorder: of the module that is called.
        args, kwargs: the arguments.
        arrays: the tensors with dimensions among them; the first holds the samples.
    """

    recorder: Recorder
    args: tuple
    kwargs: dict
    arrays: Sequence[Tensor]

    @classmethod
    def of(cls, recorder: Recorder, args: tuple, kwargs: dict) -> ModelCall:
        """With the arrays in `args` and `kwargs`."""
        return cls(recorder, args, kwargs, arrays_in(args, kwargs))

    @property
    def context(self) -> CaptureContext:
        """Of the capture."""
        return self.recorder.context

    @property
    def batch_size(self) -> int | None:
        """The number of samples, or None where no tensor comes in."""
        return batch_size(self.arrays, self.context.options.batch_dim)


def run(call: ModelCall) -> object:
    """The output of a call, without verification.

    Raises:
        ValueError: if parameters have come to places that nothing watches, or an output belongs to no sample.
    """
    recorder, args, kwargs, arrays = call
    context = recorder.context
    dim = context.options.batch_dim
    is_part = recorder.module is not context.model
    is_telling = arrays and (call.batch_size == 1 or is_part)
    if is_telling and not context.is_proving and _current_graph_task_id() == -1:
        first = arrays[0][None] if dim is None else arrays[0].movedim(dim, 0)
        context.calls.note(recorder.module, recorder.name, first, is_part)
    batch = Batch.among(arrays, context.model, dim, is_list(args, kwargs))
    output = context.calls.run(batch, partial(recorder.run, args, kwargs))
    context.parameters.admit_newcomers()
    for tensor in (output,) if isinstance(output, Tensor) else tensors_in(output):
        if isinstance(tensor, SharedTensor):
            raise ValueError(_shared_output(tensor))
    return output


def _shared_output(output: SharedTensor) -> str:
    return (
        f"an output of the model, of shape {tuple(output.shape)}, comes from '{output.owner}' alone, which"
        " took its input as shared by all samples; if it was the batch merged with another dimension, keep"
        f" the two apart, (B, T), or {AS_UNIT}"
    )
