"""The recorder of nn.MultiheadAttention."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from ..batch import AS_UNIT, ELSEWHERE, ONE_AT_A_TIME, Batch
from ..values.samples import MappedArgument
from ..values.shared_tensor import SharedTensor
from .unit import UnitRecorder


class AttentionRecorder(UnitRecorder):
    """Records an nn.MultiheadAttention as a unit. The names of its arguments tell where their samples are."""

    _signature = inspect.signature(nn.MultiheadAttention.forward)

    def _map_arguments(self, batch, args, kwargs):
        dim = 0 if self.module.batch_first else 1
        arguments = self._signature.bind(self.module, *args, **kwargs).arguments
        del arguments["self"]
        # One object for equal ones among query, key and value, since torch compares these by identity.
        mapped: dict[int, Tensor | MappedArgument] = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                key = id(value) if name in ("query", "key", "value") else id(name)
                if key not in mapped:
                    mapped[key] = self._map_tensor(batch, name, value, dim)
                arguments[name] = mapped[key]
        return (), dict(arguments), lambda number: [dim, 0][:number]

    def _map_tensor(self, batch: Batch, name: str, value: Tensor, dim: int) -> Tensor | MappedArgument:
        """The argument `name` as every sample gets it; `dim` is the dimension of the samples in queries."""
        if isinstance(value, SharedTensor):
            return MappedArgument(value.copies)
        if name == "attn_mask" and value.ndim == 2:
            return value
        if name == "attn_mask":
            if value.ndim != 3 or len(value) != batch.size * self.module.num_heads:
                raise ValueError(
                    f"module '{self.name}' got an attn_mask of shape {tuple(value.shape)} in a batch of {batch.size}"
                    f" samples: expected (L, S), or (B h, L, S) for {self.module.num_heads} heads"
                )
            return MappedArgument(value.view(batch.size, -1, *value.shape[1:]))
        if name in ("query", "key", "value") and value.ndim == 2:
            raise ValueError(
                f"module '{self.name}' got a {name} of shape {tuple(value.shape)} without a batch: pass x[None], or"
                f" what else has the samples along dimension {dim}; where it is called for each sample, {AS_UNIT}; or"
                f" {ONE_AT_A_TIME}"
            )
        dim = 0 if name == "key_padding_mask" else dim
        if value.ndim <= dim or value.shape[dim] != batch.size:
            raise ValueError(
                f"module '{self.name}' got a {name} of shape {tuple(value.shape)} in a batch of {batch.size} samples:"
                f" expected the samples along dimension {dim} (batch_first={self.module.batch_first}). {ELSEWHERE}"
            )
        return MappedArgument.batches_of_one(value, dim)
