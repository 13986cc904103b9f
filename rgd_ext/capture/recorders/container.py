"""The recorder of modules that have parameters of their own and children with parameters."""

from __future__ import annotations

from functools import partial

from ..batch import check_not_empty
from ..values.shared_tensor import SharedTensor, shared_tensor
from .recorder import Recorder


class ContainerRecorder(Recorder):
    """Records a module whose children have recorders of their own, and whose own parameters all samples share.

    In its forward a `SharedTensor` stands in the place of each of its own parameters.
    """

    def record(self, batch, parameters, args, kwargs):
        batch = self.batch_with_size(batch, args, kwargs)
        if batch.size is None:
            raise ValueError(
                f"module '{self.name}' uses its own parameters but was called without a tensor, so the batch size is"
                " unknown; call the captured model itself, with the batch as its first tensor"
            )
        check_not_empty(batch.size, self.name)
        copies = self._copies(parameters, batch.size)
        make_call = partial(self._make_call, batch_size=batch.size)
        shared = {
            name: shared_tensor(each, f"{self.name}.{name}", batch, parameters[name], make_call)
            for name, each in copies.items()
        }
        with self._reparametrized(shared):
            output = self.original(*args, **kwargs)
        self._unwrap_buffers()
        return output

    def _unwrap_buffers(self) -> None:
        """Make buffers that the forward computed from parameters ordinary tensors again."""
        for name, buffer in self.module._buffers.items():
            if isinstance(buffer, SharedTensor):
                if buffer.value.tensor.requires_grad:
                    raise ValueError(
                        f"module '{self.name}' ({type(self.module).__name__}) gives '{name}', a buffer, a value that"
                        " depends on parameters and has a gradient: detach it"
                    )
                self.module._buffers[name] = buffer.value.tensor
