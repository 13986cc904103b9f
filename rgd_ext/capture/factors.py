"""One parameter's per-sample contributions in the form its layer gives them, and a model's worth of them.

A backward of a loss L gives contributions h_i with sum_i h_i = grad L. The per-sample gradients are g_i = B h_i, so
that their mean is grad L whatever the reduction of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..gradients import squared_norm
from ..reference import accumulate_dtype


class Factor(Protocol):
    """Contributions h_i of one parameter, (B, *shape) in effect."""

    @property
    def batch_size(self) -> int:
        """B."""
        ...

    def gram(self) -> Tensor:
        """<h_i, h_j>, (B, B), in the accumulation dtype."""
        ...

    def align(self, vector: Tensor) -> Tensor:
        """<h_i, v>, (B,)."""
        ...

    def combine(self, weights: Tensor) -> Tensor:
        """sum_i w_i h_i, (*shape), for weights in the dtype and on the device of the contributions."""
        ...

    def dense(self) -> Tensor:
        """(B, *shape)."""
        ...

    def settled(self) -> Factor:
        """This factor in the form that is cheapest from here on."""
        ...


class Dense:
    """Contributions as a tensor (B, *shape)."""

    def __init__(self, contributions: Tensor) -> None:
        self.contributions = contributions

    @property
    def batch_size(self) -> int:
        return self.contributions.shape[0]

    def gram(self) -> Tensor:
        return ops.gram(self.contributions)

    def align(self, vector: Tensor) -> Tensor:
        return (self.contributions * vector).flatten().view(self.batch_size, -1).sum(1)

    def combine(self, weights: Tensor) -> Tensor:
        return ops.combine(self.contributions, weights)[0]

    def dense(self) -> Tensor:
        return self.contributions

    def settled(self) -> Factor:
        return self


class Outer:
    """h_i = sum_t e_it a_it^T viewed as `shape`: every weight that multiplies T vectors of each sample.

    Args:
        inputs: A, (B, T, n).
        output_grads: E, (B, T, m).
        shape: of the parameter, m n elements.
    """

    # Temporaries of a chunked Gramian, in elements.
    _CHUNK = 1 << 24

    def __init__(self, inputs: Tensor, output_grads: Tensor, shape: torch.Size) -> None:
        self.inputs, self.output_grads, self.shape = inputs, output_grads, shape

    @property
    def batch_size(self) -> int:
        return self.inputs.shape[0]

    def _operands(self) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(self.output_grads.dtype)
        return self.inputs.to(dtype), self.output_grads.to(dtype)

    def gram(self) -> Tensor:
        """K_ij = sum_ts <a_it, a_js> <e_it, e_js>: the weight gradient is never formed."""
        inputs, output_grads = self._operands()
        batch_size, length, _ = inputs.shape
        inputs, output_grads = inputs.flatten(0, 1), output_grads.flatten(0, 1)
        samples = max(1, self._CHUNK // (length * length * batch_size))
        rows = []
        for a, e in zip(inputs.split(samples * length), output_grads.split(samples * length), strict=True):
            products = (a @ inputs.T).mul_(e @ output_grads.T)
            rows.append(products.view(-1, length, batch_size, length).sum((1, 3)))
        return torch.cat(rows)

    def align(self, vector: Tensor) -> Tensor:
        inputs, output_grads = self._operands()
        matrix = vector.reshape(output_grads.shape[-1], inputs.shape[-1]).to(inputs.dtype)
        return (inputs @ matrix.T).mul_(output_grads).sum((1, 2))

    def combine(self, weights: Tensor) -> Tensor:
        # One plain weight-gradient product over all samples, as in the backward of SGD.
        weighted = self.output_grads * weights.view(-1, 1, 1)
        return torch.mm(weighted.flatten(0, 1).T, self.inputs.flatten(0, 1)).view(self.shape)

    def dense(self) -> Tensor:
        return (self.output_grads.mT @ self.inputs).view(self.batch_size, *self.shape)

    def settled(self) -> Factor:
        batch_size, length, n = self.inputs.shape
        m = self.output_grads.shape[-1]
        fits = batch_size * n * m <= 4 * (self.inputs.numel() + self.output_grads.numel())
        return Dense(self.dense()) if fits and not self.gram_is_cheaper(batch_size, length, n, m) else self

    @staticmethod
    def gram_is_cheaper(batch_size: int, length: int, n: int, m: int) -> bool:
        """Whether `gram` of (B, T, n) and (B, T, m) is faster than forming the gradients and their Gramian."""
        # Operations. Measured: those on gradients in memory take twice as long.
        return batch_size * length**2 * (n + m) <= 2 * (length * n * m + batch_size * n * m / 2)


class Bias:
    """h_i = sum_t e_it: the bias beside an `Outer` weight."""

    def __init__(self, weight: Outer) -> None:
        self.weight, self.output_grads = weight, weight.output_grads

    @property
    def batch_size(self) -> int:
        return self.output_grads.shape[0]

    def gram(self) -> Tensor:
        return ops.gram(self.dense())

    def align(self, vector: Tensor) -> Tensor:
        return self.dense() @ vector

    def combine(self, weights: Tensor) -> Tensor:
        return weights @ self.dense()

    def dense(self) -> Tensor:
        return self.output_grads[:, 0] if self.output_grads.shape[1] == 1 else self.output_grads.sum(1)

    def settled(self) -> Factor:
        return self if self.output_grads.shape[1] == 1 else Dense(self.dense())


class Rows:
    """h_i = sum_t (row indices_it of the parameter gets e_it): an embedding's weight.

    Args:
        indices: (B, T), int64.
        output_grads: E, (B, T, n).
        shape: of the parameter, (rows, n).
    """

    def __init__(self, indices: Tensor, output_grads: Tensor, shape: torch.Size) -> None:
        self.indices, self.output_grads, self.shape = indices, output_grads, shape

    @property
    def batch_size(self) -> int:
        return self.indices.shape[0]

    def gram(self) -> Tensor:
        """K in blocks of the rows in use, so that nothing larger than E is held."""
        batch_size, length, width = self.output_grads.shape
        used, position = self.indices.unique(return_inverse=True)
        order = position.flatten().argsort(stable=True)
        sample = torch.arange(batch_size, device=order.device).repeat_interleave(length)[order]
        position, grads = position.flatten()[order], self.output_grads.flatten(0, 1)[order]
        gram = 0
        for start in range(0, used.numel(), length):
            first, last = torch.searchsorted(position, torch.tensor([start, start + length], device=order.device))
            block = grads.new_zeros(batch_size * length, width)
            block.index_add_(0, sample[first:last] * length + position[first:last] - start, grads[first:last])
            gram = gram + ops.gram(block.view(batch_size, length, width))
        return gram

    def align(self, vector: Tensor) -> Tensor:
        return (vector[self.indices] * self.output_grads).sum((1, 2))

    def combine(self, weights: Tensor) -> Tensor:
        weighted = self.output_grads * weights[:, None, None]
        return weighted.new_zeros(self.shape).index_add_(0, self.indices.flatten(), weighted.flatten(0, 1))

    def dense(self) -> Tensor:
        batch_size, rows = self.batch_size, self.shape[0]
        offsets = torch.arange(batch_size, device=self.indices.device)[:, None] * rows
        result = self.output_grads.new_zeros(batch_size * rows, *self.shape[1:])
        result.index_add_(0, (self.indices + offsets).flatten(), self.output_grads.flatten(0, 1))
        return result.view(batch_size, *self.shape)

    def settled(self) -> Factor:
        return self


def add(factors: list[Factor]) -> Factor:
    """The sum of one parameter's contributions from several uses: tied weights, a module called twice."""
    if len(factors) == 1:
        return factors[0]
    if all(isinstance(f, Outer) for f in factors):
        inputs = torch.cat([f.inputs for f in factors], 1)
        return Outer(inputs, torch.cat([f.output_grads for f in factors], 1), factors[0].shape)
    if all(isinstance(f, Rows) for f in factors):
        indices = torch.cat([f.indices for f in factors], 1)
        return Rows(indices, torch.cat([f.output_grads for f in factors], 1), factors[0].shape)
    return Dense(torch.stack([f.dense() for f in factors]).sum(0))


def join(factors: list[Factor]) -> Factor:
    """One parameter's contributions in several batches as those in their union."""
    if all(isinstance(f, Outer) for f in factors):
        inputs, output_grads = _stacked([f.inputs for f in factors]), _stacked([f.output_grads for f in factors])
        return Outer(inputs, output_grads, factors[0].shape)
    if all(isinstance(f, Rows) for f in factors):
        # Row 0 gets the zeros that fill shorter sequences.
        indices, output_grads = _stacked([f.indices for f in factors]), _stacked([f.output_grads for f in factors])
        return Rows(indices, output_grads, factors[0].shape)
    return Dense(torch.cat([f.dense() for f in factors]))


def _stacked(sequences: list[Tensor]) -> Tensor:
    """(B_k, T_k, ...) one below the other, filled up with zeros to the longest T_k."""
    length = max(x.shape[1] for x in sequences)
    padding = [x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:]) for x in sequences]
    return torch.cat([torch.cat([x, zeros], 1) for x, zeros in zip(sequences, padding, strict=True)])


@dataclass
class _Single:
    """A weight and a bias that met one vector per sample: h_i = e_i a_i^T and e_i.

    Attributes:
        output_grads: E, (B, m).
        inputs: A, (B, n), with n = 0 if the weight is frozen.
        shape: of the weight.
        weight, bias: their places among a model's parameters, or None for one that is frozen.
    """

    output_grads: Tensor
    inputs: Tensor
    shape: torch.Size
    weight: int | None = None
    bias: int | None = None

    def combine(self, weights: Tensor) -> dict[int, Tensor]:
        weighted = self.output_grads * weights[:, None]
        result = {}
        # The bias first: the product drives from the caches what the two share.
        if self.bias is not None:
            result[self.bias] = weighted.sum(0)
        if self.weight is not None:
            result[self.weight] = torch.mm(weighted.T, self.inputs).view(self.shape)
        return result


class CapturedGradients:
    """`PerSampleGradients` of a model after its backward: g_i = B h_i from one factor per parameter."""

    def __init__(self, factors: list[Factor]) -> None:
        self._factors = [f.settled() for f in factors]
        # By dtype and device.
        self._dense: dict[tuple, list[int]] = {}
        self._singles: dict[tuple, list[_Single]] = {}
        self._others: list[int] = []
        weights: dict[Factor, _Single] = {}
        for index, factor in enumerate(self._factors):
            if isinstance(factor, Dense):
                self._dense.setdefault(_kind(factor.contributions), []).append(index)
            elif isinstance(factor, Outer) and factor.output_grads.shape[1] == 1:
                weights[factor] = _Single(factor.output_grads[:, 0], factor.inputs[:, 0], factor.shape, weight=index)
                self._singles.setdefault(_kind(factor.output_grads), []).append(weights[factor])
            elif isinstance(factor, Bias) and factor.weight in weights:
                weights[factor.weight].bias = index
            elif isinstance(factor, Bias):
                grads = factor.dense()
                lone = _Single(grads, grads[:, :0], torch.Size(), bias=index)
                self._singles.setdefault(_kind(grads), []).append(lone)
            else:
                self._others.append(index)

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self._factors[0].batch_size

    def _groups(self) -> list[list[Tensor]]:
        return [[self._factors[i].contributions for i in indices] for indices in self._dense.values()]

    def mean(self) -> list[Tensor]:
        """g = mean_i g_i, which is the gradient of the loss."""
        return self.combine(self._equal_weights())

    def dense(self) -> list[Tensor]:
        """G as (B, *shape) tensors."""
        return [self.batch_size * f.dense() for f in self._factors]

    def _equal_weights(self) -> Tensor:
        first = self._factors[0]
        reference = first.contributions if isinstance(first, Dense) else first.output_grads
        return reference.new_full((self.batch_size,), 1 / self.batch_size, dtype=accumulate_dtype(reference.dtype))

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        return self.batch_size * _sum([f.align(v) for f, v in zip(self._factors, vector, strict=True)])

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred."""
        return self.batch_size**2 * _sum([ops.gram(group) for group in self._groups()] + self._grams())

    def _grams(self) -> list[Tensor]:
        """Parts of K / B^2 from what is not dense."""
        grams = [self._factors[index].gram() for index in self._others]
        for layers in self._singles.values():
            inputs, output_grads = [s.inputs for s in layers], [s.output_grads for s in layers]
            grams.append(torch.ops.rgd_ext.ghost_gram(inputs, output_grads, [s.bias is not None for s in layers]))
        return grams

    def scalars(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """|g|^2, the centred alignments and the centred squared norms; None where the Gramian costs no more."""
        if not self._dense:
            return None
        squared, alignments, squared_norms = [], [], []
        for group in self._groups():
            mean, a, n = ops.moments(group)
            squared.append(squared_norm(mean))
            alignments.append(a)
            squared_norms.append(n)
        for gram in self._grams():
            norm, a, n, _ = torch.ops.rgd_ext.gram_moments(gram)
            squared.append(norm.to(gram.dtype))
            alignments.append(a.to(gram.dtype))
            squared_norms.append(n.to(gram.dtype))
        scale = self.batch_size**2
        return scale * _sum(squared), scale * _sum(alignments), scale * _sum(squared_norms)

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i."""
        weights = weights * self.batch_size
        result: dict[int, Tensor] = {}
        for indices, group in zip(self._dense.values(), self._groups(), strict=True):
            result |= zip(indices, ops.combine(group, weights.to(group[0].device)), strict=True)
        for layers in self._singles.values():
            converted = weights.to(layers[0].output_grads)
            for layer in layers:
                result |= layer.combine(converted)
        for index in self._others:
            factor = self._factors[index]
            result[index] = factor.combine(weights.to(factor.output_grads))
        return [result[index] for index in range(len(self._factors))]


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _sum(parts: list[Tensor]) -> Tensor:
    """The sum of statistics that may come from several devices and accumulation dtypes."""
    if len(parts) == 1:
        return parts[0]
    dtype = max((p.dtype for p in parts), key=lambda d: d.itemsize)
    total = parts[0].to(dtype, copy=True)
    for part in parts[1:]:
        total += part.to(total.device)
    return total
