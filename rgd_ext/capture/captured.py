"""Per-sample gradients of a model after its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gradients import Moments, moments_of, squared_norm, total
from ..reference import accumulate_dtype
from .aside import Aside, Singles
from .factors import Bias, Dense, Factor, Ghost, Outer, of_gram


@dataclass(slots=True)
class _Place:
    """Of a linear layer that met one vector per sample.

    Attributes:
        shape: of its weight.
        weight, bias: where they are among a model's parameters; None for one that is frozen.
    """

    shape: torch.Size
    weight: int | None = None
    bias: int | None = None


class CapturedGradients:
    """`PerSampleGradients` of a model after its backward: g_i = B h_i.

    Args:
        factors: one per parameter.
        given: the contributions of more parameters, uniform; they follow in the order of its `parameters`.
        is_spent: `combine` is the last that is asked. Inputs and output gradients are let go of as they are spent, so
            that the directions take their memory.
    """

    def __init__(self, factors: list[Factor], given: Aside | None = None, is_spent: bool = False) -> None:
        self._factors, self._given, self._is_spent = factors, given, is_spent
        self._given_tensors, self._given_singles = (given.tensors(), given.singles()) if given else ([], None)
        # By dtype and device: their places among the parameters, and the contributions.
        self._dense: dict[tuple, tuple[list[int], list[Tensor]]] = {}
        self._singles: dict[tuple, tuple[list[_Place], Singles]] = {}
        self._others: dict[int, Factor] = {}
        weights: dict[Factor, tuple[_Place, Singles, int]] = {}
        for index, factor in enumerate(factors):
            kind = type(factor)
            if kind is Dense:
                self._add_dense([index], [factor.contributions])
            elif kind is Outer and factor.is_single:
                weights[factor] = self._add_single(_Place(factor.shape, weight=index), *factor.rows())
            elif kind is Bias and factor.weight in weights:
                place, singles, number = weights[factor.weight]
                place.bias, singles.biases[number] = index, True
            elif kind is Bias:
                grads = factor.dense()
                self._add_single(_Place(torch.Size(), bias=index), grads[:, :0], grads)
            else:
                self._others[index] = factor
        self._first_given = len(factors)
        if self._given_tensors:
            places = range(self._first_given, self._first_given + len(self._given_tensors))
            self._add_dense(places, self._given_tensors)

    def _add_single(self, place: _Place, inputs: Tensor, output_grads: Tensor) -> tuple[_Place, Singles, int]:
        places, singles = self._singles.setdefault(_kind(output_grads), ([], Singles([], [], [])))
        places.append(place)
        singles.inputs.append(inputs)
        singles.output_grads.append(output_grads)
        singles.biases.append(place.bias is not None)
        return place, singles, len(places) - 1

    def _add_dense(self, indices: Sequence[int], tensors: list[Tensor]) -> None:
        places, contributions = self._dense.setdefault(_kind(tensors[0]), ([], []))
        places += indices
        contributions += tensors

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self._example.shape[0]

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
        return self._by_parameter(self._combination(weights))

    def combine_with_norm(self, weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """`combine`, and |w^T G|^2."""
        combination = self._combination(weights)
        return self._by_parameter(combination), squared_norm(combination)

    def _combination(self, weights: Tensor) -> list[Tensor]:
        """`combine`, of parameters that lie side by side as one."""
        weights = weights * float(self.batch_size)
        if self._is_spent:
            self._factors = []
            if self._given:
                self._given.layers.clear()
        result: dict[int, Tensor] = {}
        for places, singles in self._singles.values():
            combined = iter(singles.combine(weights, self._is_spent))
            for place in places:
                if place.bias is not None:
                    result[place.bias] = next(combined)
                if place.weight is not None:
                    weight = next(combined)
                    result[place.weight] = weight if len(place.shape) == 2 else weight.view(place.shape)
        for index in list(self._others):
            factor = self._others.pop(index) if self._is_spent else self._others[index]
            result[index] = factor.combine(weights.to(factor.example))
        for indices, group in self._dense.values():
            there = weights.to(group[0].device)
            result |= zip(indices, torch.ops.rgd_ext.combine(group, there), strict=True)
        found = [result[index] for index in range(len(result))]
        if self._given_singles is None:
            return found
        return found + self._given_singles.combine(weights, self._is_spent)

    def _by_parameter(self, combination: list[Tensor]) -> list[Tensor]:
        if not self._given_tensors:
            return combination
        first, last = self._first_given, self._first_given + len(self._given_tensors)
        return [*combination[:first], *self._given.apart(combination[first:last]), *combination[last:]]


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
