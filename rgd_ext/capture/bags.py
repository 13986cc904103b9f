"""nn.EmbeddingBag, whose samples are bags of indices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..reference import sum_rows
from .batch import Batch, is_marked, modules_in, tensors_in
from .embedding import Rows
from .factors import Factor
from .rules import Registered
from .shared import Shared
from .taps import Layer, merged

_REMEDIES = (
    "call the model with bags of equal length (B, T), filled up with the padding_idx of the EmbeddingBag; or, without"
    " include_last_offset, with the offsets first, by keywords, as in model(offsets=offsets, text=text)"
)


class _Flat(NamedTuple):
    """Bags one behind the other.

    Attributes:
        indices: (N,).
        starts: of the bags, (K,), or (K + 1,) with the end of the last.
        number: K.
        weights: of the indices, (N,), or None.
    """

    indices: Tensor
    starts: Tensor
    number: int
    weights: Tensor | None


def _of_rows(indices: Tensor, weights: Tensor | None) -> _Flat:
    """Bags of equal length, (B, T)."""
    starts = torch.arange(0, indices.numel(), indices.shape[1], device=indices.device)
    return _Flat(indices.reshape(-1), starts, len(indices), None if weights is None else weights.reshape(-1))


def _of_nested(indices: Tensor, weights: Tensor | None) -> _Flat:
    """Bags as torch's jagged tensors have them."""
    starts = indices.offsets()
    return _Flat(indices.values(), starts, len(starts) - 1, None if weights is None else weights.values())


def _entries(module: nn.EmbeddingBag, bags: _Flat) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N,), bags (N,), and coefficients of the rows in the bags' outputs, (N, 1) or, by feature, (N, n)."""
    rows, places = bags.indices.long(), torch.arange(len(bags.indices), device=bags.indices.device)
    bag = torch.searchsorted(bags.starts[: bags.number].long(), places, right=True) - 1
    counts = torch.ones_like(rows, dtype=torch.bool) if module.padding_idx is None else rows != module.padding_idx
    if module.mode == "max":
        return _of_maxima(module, bags, rows, bag, counts)
    coefficients = counts.to(module.weight.dtype)
    if bags.weights is not None:
        coefficients = coefficients * bags.weights.detach()
    if module.mode == "mean":
        lengths = sum_rows(coefficients, bag, bags.number)
        coefficients = coefficients / lengths.clamp(min=1)[bag]
    return rows, bag, coefficients[:, None]


def _of_maxima(
    module: nn.EmbeddingBag, bags: _Flat, rows: Tensor, bag: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_entries` of maxima: every feature has one row, chosen by torch among equals, and counts once in a bag."""
    arguments = module.weight.detach(), bags.indices, bags.starts[: bags.number]
    *_, largest = torch.embedding_bag(
        *arguments,
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


def _rule(module: nn.EmbeddingBag, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor | Factor]:
    """Every row of a bag gets the gradient of the bag's output times its coefficient.

    Args:
        module: that is called.
        inputs: `_entries`, where bags are samples; where all samples share the bags, one copy for each.
        output_grad: (B, n), or (B, K, n) of shared bags.
    """
    rows, bag, coefficients = inputs
    shape = module.weight.shape
    if rows.ndim == 1:
        return {"weight": Rows(bag, rows, output_grad[bag] * coefficients, shape, len(output_grad), module.sparse)}
    return {"weight": Rows.of_sequences(rows, output_grad[:, bag[0]] * coefficients, shape, module.sparse)}


class Bags(Layer):
    """nn.EmbeddingBag: as many samples as bags, however many indices they hold."""

    def __init__(self, capture, module, name, slots) -> None:
        super().__init__(capture, module, name, slots, Registered(_rule, 1))

    def record(self, batch, parameters, args, kwargs):
        if any(isinstance(x, Shared) for x in tensors_in((args, kwargs))):
            raise ValueError(
                f"module '{self.name}' (EmbeddingBag) got weights that all samples share: give every sample its own,"
                " with weights.expand(len(input), -1)"
            )
        bags, dim = self._bags(batch, *args, **kwargs)
        output = self._output(parameters, args, kwargs)
        entries = _entries(self.module, bags)
        if batch.at is None:
            return self._watch(parameters, 1, partial(merged, self._bound_rule, 0), output, entries)
        if dim is None:
            return self._for_all(parameters, batch, entries, output)
        return self._watch(parameters, bags.number, self._bound_rule, output, entries)

    def _bags(
        self,
        batch: Batch,
        input: Tensor,  # noqa: A002
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> tuple[_Flat, int | None]:
        """The bags, and the dimension that holds them if they are samples, which is 0; None if all samples share them.

        Raises:
            ValueError: if the number of bags is not that of the samples.
        """
        if input.is_nested:
            bags, dim = _of_nested(input, per_sample_weights), 0
        elif input.ndim == 2:
            dim = None if batch.at is None else batch.dim(input, self.module, self.name, 1)
            bags = _of_rows(input, per_sample_weights)
        else:
            if offsets is None:
                self.original(input)  # torch says what is wrong
            bags = _Flat(input, offsets, len(offsets) - self.module.include_last_offset, per_sample_weights)
            dim = None if batch.at is None else self._dim_of_flat(batch, bags)
        if dim:
            raise ValueError(
                f"module '{self.name}' (EmbeddingBag) is marked with batch_dim={dim}, but its bags are along"
                " dimension 0: call rgd_ext.mark(module, batch_dim=0)"
            )
        if dim == 0 and batch.size not in (None, bags.number):
            self._resize(batch, bags)
        return bags, dim

    def _dim_of_flat(self, batch: Batch, bags: _Flat) -> int | None:
        indices, starts = bags.indices, bags.starts[: bags.number]
        if is_marked(self.module) or batch.is_constant(indices):
            return batch.dim(starts, self.module, self.name, 0)
        if batch.is_given(indices) or batch.is_given(starts):
            return 0
        if batch.size == len(indices):
            raise ValueError(
                f"module '{self.name}' (EmbeddingBag) got {bags.number} bags of {len(indices)} indices, as many as"
                " dimension 0 of the model's first tensor: if the bags are the samples, call rgd_ext.mark(module,"
                " batch_dim=0), and with batch_dim=None if all samples share them"
            )
        return batch.dim(starts, self.module, self.name, 0)

    def _resize(self, batch: Batch, bags: _Flat) -> None:
        """There are as many samples as bags, not as many as indices or offsets, which were the model's first tensor."""
        found = f"module '{self.name}' (EmbeddingBag) got {bags.number} bags in a batch of {batch.size} samples"
        if batch.size not in (len(bags.indices), len(bags.starts)):
            raise ValueError(
                f"{found}, which is dimension 0 of the model's first tensor: {_REMEDIES}; if"
                " all samples share the bags, call rgd_ext.mark(module, batch_dim=None)"
            )
        for module in modules_in(self.capture.model):
            for parameter in module._parameters.values():
                if isinstance(parameter, Shared):
                    raise ValueError(f"{found}, after '{parameter.owner}' was used for these: {_REMEDIES}")
        self.capture.batch = replace(batch, size=bags.number)
