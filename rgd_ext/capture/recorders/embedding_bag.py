"""The recorder of nn.EmbeddingBag, whose samples are bags of indices."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...layers.registry import LayerType
from ...nests import modules_in, tensors_in
from ..batch import Batch
from ..marks import is_marked
from ..values.shared_tensor import SharedTensor
from .bags import Bags, embedding_bag, entries
from .layer import LayerRecorder, merged

_REMEDIES = (
    "call the model with bags of equal length (B, T), filled up with the padding_idx of the EmbeddingBag; or, without"
    " include_last_offset, with the offsets first, by keywords, as in model(offsets=offsets, text=text)"
)


class EmbeddingBagRecorder(LayerRecorder):
    """Records an nn.EmbeddingBag, which has as many samples as bags, however many indices they hold."""

    def __init__(self, context, module, name, places) -> None:
        super().__init__(context, module, name, places, LayerType(embedding_bag, 1))

    def record(self, batch, parameters, args, kwargs):
        if any(isinstance(x, SharedTensor) for x in tensors_in((args, kwargs))):
            raise ValueError(
                f"module '{self.name}' (EmbeddingBag) got weights that all samples share: give every sample its own,"
                " with weights.expand(len(input), -1)"
            )
        bags, dim = self._bags(batch, *args, **kwargs)
        output = self._run_frozen(parameters, args, kwargs)
        inputs = entries(self.module, bags)
        if batch.batch_dim is None:
            return self._watch(self._make_call(parameters, 1, partial(merged, self._bound_rule, 0)), output, inputs)
        if dim is None:
            return self._shared_output(parameters, batch, inputs, output)
        return self._watch(self._make_call(parameters, bags.number, self._bound_rule), output, inputs)

    def _bags(
        self,
        batch: Batch,
        input: Tensor,  # noqa: A002
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> tuple[Bags, int | None]:
        """The bags, and the dimension of the samples: 0 if the bags are samples, None if all samples share them.

        Raises:
            ValueError: if the number of bags is not that of the samples.
        """
        if input.is_nested:
            bags, dim = Bags.from_nested(input, per_sample_weights), 0
        elif input.ndim == 2:
            dim = None if batch.batch_dim is None else batch.dim(input, self.module, self.name, 1)
            bags = Bags.from_rows(input, per_sample_weights)
        else:
            if offsets is None:
                self.original(input)  # torch raises an error that says what is wrong
            bags = Bags(input, offsets, len(offsets) - self.module.include_last_offset, per_sample_weights)
            dim = None if batch.batch_dim is None else self._dim_of_flat(batch, bags)
        if dim:
            raise ValueError(
                f"module '{self.name}' (EmbeddingBag) is marked with batch_dim={dim}, but its bags are along"
                " dimension 0: call rgd_ext.mark(module, batch_dim=0)"
            )
        if dim == 0 and batch.size not in (None, bags.number):
            self._resize(batch, bags)
        return bags, dim

    def _dim_of_flat(self, batch: Batch, bags: Bags) -> int | None:
        """0 if the bags in a flat tensor with offsets are samples; None if all samples share them."""
        indices, starts = bags.indices, bags.offsets
        if is_marked(self.module) or batch.is_constant(indices):
            return batch.dim(starts, self.module, self.name, 0)
        if batch.is_input(indices) or batch.is_input(starts):
            return 0
        if batch.size == len(indices):
            raise ValueError(
                f"module '{self.name}' (EmbeddingBag) got {bags.number} bags of {len(indices)} indices, as many as"
                " dimension 0 of the model's first tensor: if the bags are the samples, call rgd_ext.mark(module,"
                " batch_dim=0), and with batch_dim=None if all samples share them"
            )
        return batch.dim(starts, self.module, self.name, 0)

    def _resize(self, batch: Batch, bags: Bags) -> None:
        """Make the batch as large as the number of bags, where the model's first tensor has the indices or offsets."""
        found = f"module '{self.name}' (EmbeddingBag) got {bags.number} bags in a batch of {batch.size} samples"
        if batch.size not in (len(bags.indices), len(bags.starts)):
            raise ValueError(
                f"{found}, which is dimension 0 of the model's first tensor: {_REMEDIES}; if"
                " all samples share the bags, call rgd_ext.mark(module, batch_dim=None)"
            )
        for module in modules_in(self.context.model):
            for parameter in module._parameters.values():
                if isinstance(parameter, SharedTensor):
                    raise ValueError(f"{found}, after '{parameter.owner}' was used for these: {_REMEDIES}")
        self.context.calls.resize(bags.number)
