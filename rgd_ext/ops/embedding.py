"""The Gramian of the per-sample gradients of an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import block_elements, sum_rows
from .library import LIBRARY, register_default, register_fake

LIBRARY.define("embedding_gram(Tensor keys, Tensor sums, int table_rows, int batch_size) -> Tensor")


@register_fake("embedding_gram")
def _(keys: Tensor, sums: Tensor, table_rows: int, batch_size: int) -> Tensor:
    return sums.new_empty(batch_size, batch_size)


@register_default("embedding_gram")
def default_embedding_gram(keys: Tensor, sums: Tensor, table_rows: int, batch_size: int) -> Tensor:
    """The Gramian of an embedding's gradients, (B, B), from the sums of the entries of each sample and row.

    Args:
        keys: sample * table_rows + row of each entry, (N,), ascending.
        sums: (N, n): the first entry with a key has the sum over all entries with it, and the others have zeros.
        table_rows: of the table.
        batch_size: B.
    """
    samples, rows = keys // table_rows, keys % table_rows
    gram, number = sums.new_zeros(batch_size, batch_size), max(1, block_elements(keys.device) // max(1, len(keys)))
    for some in torch.arange(len(keys), device=keys.device).split(number):
        products = (sums @ sums[some].T).masked_fill_(rows[:, None] != rows[some], 0)
        gram += sum_rows(sum_rows(products, samples, batch_size).T.contiguous(), samples[some], batch_size)
    return (gram + gram.T) / 2
