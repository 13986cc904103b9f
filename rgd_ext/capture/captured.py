"""Per-sample gradients of a model after its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gradients import Moments, moments_of, squared_norm, total
from ..reference import accumulate_dtype
from .aside import Aside, Singles
from .embedding import Rows
from .factors import Bias, Dense, Factor, Ghost, Outer, Unformed, of_gram


@dataclass(slots=True)
class _Place:
    """Where the weight and the bias of a linear layer, which met one vector per sample, are among the parameters.

    Attributes:
        shape: of the weight.
        weight, bias: their places; None for one that is frozen.
    """

    shape: torch.Size
    weight: int | None = None
    bias: int | None = None


class CapturedGradients:
    """`PerSampleGradients` of a model after its backward: g_i = B h_i.

    Args:
        factors: one per parameter.
        given: the contributions of more parameters, uniform; they follow in the order of its `parameters`.
        releases: the first combination is the last that is asked. It lets go of inputs and output gradients, those of
            `given` included, as it goes, so that the directions take their memory; nobody else may hold them. It gives
            sparse tensors where the parameters' ordinary gradients are.
    """

    def __init__(self, factors: list[Factor], given: Aside | None = None, releases: bool = False) -> None:
        self._factors, self._given, self._releases = factors, given, releases
        self._given_tensors, self._given_singles = (given.tensors(), given.singles()) if given else ([], None)
        # By dtype and device: their places among the parameters, and the contributions.
        self._dense: dict[tuple, tuple[list[int], list[Tensor]]] = {}
        self._singles: dict[tuple, tuple[list[_Place], Singles]] = {}
        self._others: dict[int, Unformed] = {}
        weights: dict[Factor, _Place] = {}
        for index, factor in enumerate(factors):
            kind = type(factor)
            if kind is Dense:
                self._add_dense([index], [factor.contributions])
            elif kind is Outer and factor.is_single:
                weights[factor] = _Place(factor.shape, weight=index)
                self._add_single(weights[factor], *factor.rows())
            elif kind is Bias and factor.weight in weights:
                weights[factor.weight].bias = index
            elif kind is Bias:
                grads = factor.dense()
                self._add_single(_Place(torch.Size(), bias=index), grads[:, :0], grads)
            else:
                self._others[index] = factor
        for places, singles in self._singles.values():
            singles.biases = [place.bias is not None for place in places]
        self._first_given = len(factors)
        if self._given_tensors:
            indices = range(self._first_given, self._first_given + len(self._given_tensors))
            self._add_dense(indices, self._given_tensors)

    def _add_single(self, place: _Place, inputs: Tensor, output_grads: Tensor) -> None:
        places, singles = self._singles.setdefault(_kind(output_grads), ([], Singles([], [], [])))
        places.append(place)
        singles.inputs.append(inputs)
        singles.output_grads.append(output_grads)

    def _add_dense(self, indices: Sequence[int], tensors: list[Tensor]) -> None:
        places, contributions = self._dense.setdefault(_kind(tensors[0]), ([], []))
        places += indices
        contributions += tensors

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self._factors[0].batch_size if self._factors else self._example.shape[0]

    @property
    def _example(self) -> Tensor:
        if self._factors:
            return self._factors[0].example
        return self._given_tensors[0] if self._given_tensors else self._given_singles.output_grads[0]

    def mean(self) -> list[Tensor]:
        """g = mean_i g_i, which is the gradient of the loss."""
        return self.combine(self._equal_weights())

    def dense(self) -> list[Tensor]:
        """G as (B, *shape) tensors."""
        return [self.batch_size * f.dense() for f in self._all()]

    def _all(self) -> list[Factor]:
        if not self._given:
            return self._factors
        given = dict(self._given.factors())
        return self._factors + [given[parameter] for parameter in self._given.parameters()]

    def _equal_weights(self) -> Tensor:
        example = self._example
        return example.new_full((self.batch_size,), 1 / self.batch_size, dtype=accumulate_dtype(example.dtype))

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        return self.batch_size * total([f.align(v) for f, v in zip(self._all(), vector, strict=True)])

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred."""
        others = [factor.gram() for factor in self._others.values()]
        dense = [torch.ops.rgd_ext.gram(group) for _, group in self._dense.values()]
        gram = total(dense + self._single_grams() + others)
        # Of a float: torch converts an int first, with an operator of its own.
        return gram.mul_(float(self.batch_size**2))

    def _single_grams(self) -> list[Tensor]:
        grams = [singles.gram() for _, singles in self._singles.values()]
        return grams if self._given_singles is None else [*grams, self._given_singles.gram()]

    def scalars(self) -> Moments | None:
        """|g|^2, the centred alignments and the centred squared norms; None where the Gramian costs no more."""
        if not self._dense and all(isinstance(f, Ghost) for f in self._others.values()):
            return None
        parts = [moments_of(group) for _, group in self._dense.values()]
        parts += [factor.moments() for factor in self._others.values()]
        parts += [of_gram(gram) for gram in self._single_grams()]
        squared, alignments, squared_norms = map(total, zip(*parts, strict=True))
        scale = float(self.batch_size**2)  # as in `gram`
        return scale * squared, scale * alignments, scale * squared_norms

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i."""
        return self._by_parameter(self._combine_joined(weights))

    def combine_with_norm(self, weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """`combine`, and |w^T G|^2: that of joined parameters takes fewer operations."""
        joined = self._combine_joined(weights)
        return self._by_parameter(joined), squared_norm(joined)

    def _combine_joined(self, weights: Tensor) -> list[Tensor]:
        """`combine`, but of parameters that lie side by side as one."""
        weights = weights * float(self.batch_size)
        if self._releases:  # what they hold goes piece by piece
            self._factors = []
            if self._given:
                self._given.layers.clear()
        result: dict[int, Tensor] = {}
        # First what gives memory back.
        for places, singles in self._singles.values():
            combined = iter(self._combined(singles, weights))
            for place in places:
                if place.bias is not None:
                    result[place.bias] = next(combined)
                if place.weight is not None:
                    weight = next(combined)
                    result[place.weight] = weight if weight.shape == place.shape else weight.view(place.shape)
        last = self._combined(self._given_singles, weights) if self._given_singles else []
        others = self._others if self._releases else dict(self._others)
        while others:
            index, factor = others.popitem()
            is_sparse = self._releases and isinstance(factor, Rows) and factor.is_sparse
            there = _beside(weights, factor.example)
            result[index] = factor.combine_sparse(there) if is_sparse else factor.combine(there)
            del factor
        for indices, group in self._dense.values():
            there = weights.to(group[0].device)
            result |= zip(indices, torch.ops.rgd_ext.combine(group, there), strict=True)
        return [result[index] for index in range(len(result))] + last

    def _combined(self, singles: Singles, weights: Tensor) -> list[Tensor]:
        return singles.combine_and_release(weights) if self._releases else singles.combine(weights)

    def _by_parameter(self, joined: list[Tensor]) -> list[Tensor]:
        if not self._given_tensors:
            return joined
        first, last = self._first_given, self._first_given + len(self._given_tensors)
        return [*joined[:first], *self._given.apart(joined[first:last]), *joined[last:]]


def _beside(weights: Tensor, example: Tensor) -> Tensor:
    """`weights` for contributions like `example`."""
    return weights.to(example.device, accumulate_dtype(example.dtype))


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
