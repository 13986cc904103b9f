"""Bags of indices, as nn.EmbeddingBag takes them, and its rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...contributions.factor import Factor
from ...contributions.rows import Rows
from ...linalg import sum_rows


class Bags(NamedTuple):
    """Bags of indices, one behind the other.

    Attributes:
        indices: the indices of all bags, (N,).
        starts: where the bags start, (K,), or (K + 1,) with the end of the last.
        number: K, the number of bags.
        weights: the weights of the indices, (N,), or None.
    """

    indices: Tensor
    starts: Tensor
    number: int
    weights: Tensor | None

    @classmethod
    def from_rows(cls, indices: Tensor, weights: Tensor | None) -> Bags:
        """Bags of equal length, (B, T)."""
        starts = torch.arange(0, indices.numel(), indices.shape[1], device=indices.device)
        return cls(indices.reshape(-1), starts, len(indices), None if weights is None else weights.reshape(-1))

    @classmethod
    def from_nested(cls, indices: Tensor, weights: Tensor | None) -> Bags:
        """The bags of a jagged tensor."""
        starts = indices.offsets()
        return cls(indices.values(), starts, len(starts) - 1, None if weights is None else weights.values())

    @property
    def offsets(self) -> Tensor:
        """Where the bags start, (K,)."""
        return self.starts[: self.number]


def entries(module: nn.EmbeddingBag, bags: Bags) -> tuple[Tensor, Tensor, Tensor]:
    """What the outputs of `module` are sums of: rows of its table, times coefficients.

    Returns:
        The rows (N,), their bags (N,), and the coefficients (N, 1), or (N, n) where they differ between features.
    """
    rows, positions = bags.indices.long(), torch.arange(len(bags.indices), device=bags.indices.device)
    bag = torch.searchsorted(bags.offsets.long(), positions, right=True) - 1
    counts = torch.ones_like(rows, dtype=torch.bool) if module.padding_idx is None else rows != module.padding_idx
    if module.mode == "max":
        return _entries_of_maxima(module, bags, rows, bag, counts)
    coefficients = counts.to(module.weight.dtype)
    if bags.weights is not None:
        coefficients = coefficients * bags.weights.detach()
    if module.mode == "mean":
        lengths = sum_rows(coefficients, bag, bags.number)
        coefficients = coefficients / lengths.clamp(min=1)[bag]
    return rows, bag, coefficients[:, None]


def _entries_of_maxima(
    module: nn.EmbeddingBag, bags: Bags, rows: Tensor, bag: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`entries` for maxima: every feature has one row, chosen by torch among equals, and counts once in a bag."""
    *_, largest = torch.embedding_bag(
        module.weight.detach(),
        bags.indices,
        bags.offsets,
        scale_grad_by_freq=False,
        mode=2,  # max
        sparse=False,
        per_sample_weights=None,
        include_last_offset=False,
        padding_idx=module.padding_idx,
    )
    # After sorting, the entries of a row that is in a bag twice are adjacent. Counting them would make the host wait.
    pairs, order = (rows * bags.number + bag).sort()
    is_first = torch.ones_like(counts)
    is_first[1:] = pairs[1:] != pairs[:-1]
    rows, bag = pairs // bags.number, pairs % bags.number
    return rows, bag, (largest[bag] == rows[:, None]) & (is_first & counts[order])[:, None]


def embedding_bag(
    module: nn.EmbeddingBag, inputs: tuple[Tensor, ...], output_grad: Tensor
) -> dict[str, Tensor | Factor]:
    """The rule: every row of a bag gets the gradient of the bag's output times its coefficient.

    Args:
        module: the module.
        inputs: its `entries`, where bags are samples; or, where all samples share the bags, one copy of them for each.
        output_grad: (B, n), or (B, K, n) for shared bags.
    """
    rows, bag, coefficients = inputs
    shape = module.weight.shape
    if rows.ndim == 1:
        return {"weight": Rows(bag, rows, output_grad[bag] * coefficients, shape, len(output_grad), module.sparse)}
    return {"weight": Rows.of_sequences(rows, output_grad[:, bag[0]] * coefficients, shape, module.sparse)}
