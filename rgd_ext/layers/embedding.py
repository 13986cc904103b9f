"""The rule of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contributions.factor import Factor
from ..contributions.rows import Rows


def embedding(module: nn.Embedding, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """Row x_it of the table gets e_it, unless it is the row for padding."""
    indices = inputs[0].reshape(inputs[0].shape[0], -1).long()  # products with B do not fit in int32
    output_grad = output_grad.reshape(*indices.shape, -1)
    if module.padding_idx is not None:
        output_grad = output_grad.masked_fill((indices == module.padding_idx)[..., None], 0)
    if module.scale_grad_by_freq:
        # bincount would make the host wait for the largest index. Integer sums do not depend on the order of atomics.
        ones = torch.ones_like(indices).flatten()
        counts = ones.new_zeros(module.num_embeddings).index_add_(0, indices.flatten(), ones)
        output_grad = output_grad / counts[indices][..., None]
    return {"weight": Rows.of_sequences(indices, output_grad, module.weight.shape, module.sparse)}
