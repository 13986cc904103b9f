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
class _Layer:
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


class CapturedGradients:
    """`PerSampleGradients` of a model after its backward: g_i = B h_i.

    Args:
        factors: one per parameter.
        given: the contributions of more parameters, uniform; they follow in the order of its `parameters`.
    """

    def __init__(self, factors: list[Factor], given: Aside | None = None) -> None:
        self._factors, self._given = factors, given
        self._given_tensors, self._given_singles = (given.tensors(), given.singles()) if given else ([], None)
        # By dtype and device: their places among the parameters, and the contributions.
        self._dense: dict[tuple, tuple[list[int], list[Tensor]]] = {}
        self._singles: dict[tuple, list[_Layer]] = {}
        self._others: list[int] = []
        weights: dict[Factor, _Layer] = {}
        for index, factor in enumerate(self._factors):
            kind = type(factor)
            if kind is Dense:
                self._add_dense([index], [factor.contributions])
            elif kind is Outer and factor.is_single:
                inputs, output_grads = factor.rows()
                weights[factor] = _Layer(output_grads, inputs, factor.shape, weight=index)
                self._singles.setdefault(_kind(output_grads), []).append(weights[factor])
            elif kind is Bias and factor.weight in weights:
                weights[factor.weight].bias = index
            elif kind is Bias:
                grads = factor.dense()
                lone = _Layer(grads, grads[:, :0], torch.Size(), bias=index)
                self._singles.setdefault(_kind(grads), []).append(lone)
            else:
                self._others.append(index)
        if self._given_tensors:
            self._add_dense(range(len(factors), len(factors) + len(self._given_tensors)), self._given_tensors)

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
        others = [self._factors[index].gram() for index in self._others]
        dense = [torch.ops.rgd_ext.gram(group) for _, group in self._dense.values()]
        gram = total(dense + self._single_grams() + others)
        # Of a float: torch converts an int first, with an operator of its own.
        return gram.mul_(float(self.batch_size**2))

    def _single_grams(self) -> list[Tensor]:
        grams = [_gathered(layers).gram() for layers in self._singles.values()]
        return grams if self._given_singles is None else [*grams, self._given_singles.gram()]

    def scalars(self) -> Moments | None:
        """|g|^2, the centred alignments and the centred squared norms; None where the Gramian costs no more."""
        others = [self._factors[index] for index in self._others]
        if not self._dense and all(isinstance(f, Ghost) for f in others):
            return None
        parts = [moments_of(group) for _, group in self._dense.values()] + [f.moments() for f in others]
        parts += [of_gram(gram) for gram in self._single_grams()]
        squared, alignments, squared_norms = map(total, zip(*parts, strict=True))
        scale = self.batch_size**2
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
        result: dict[int, Tensor] = {}
        for indices, group in self._dense.values():
            there = weights.to(group[0].device)
            result |= zip(indices, torch.ops.rgd_ext.combine(group, there), strict=True)
        for layers in self._singles.values():
            combined = iter(_gathered(layers).combine(weights))
            for layer in layers:
                if layer.bias is not None:
                    result[layer.bias] = next(combined)
                if layer.weight is not None:
                    weight = next(combined)
                    result[layer.weight] = weight if len(layer.shape) == 2 else weight.view(layer.shape)
        for index in self._others:
            factor = self._factors[index]
            result[index] = factor.combine(weights.to(factor.example))
        found = [result[index] for index in range(len(result))]
        return found if self._given_singles is None else found + self._given_singles.combine(weights)

    def _by_parameter(self, combination: list[Tensor]) -> list[Tensor]:
        first, last = len(self._factors), len(self._factors) + len(self._given_tensors)
        if first == last:
            return combination
        return [*combination[:first], *self._given.apart(combination[first:last]), *combination[last:]]


def _gathered(layers: list[_Layer]) -> Singles:
    return Singles([s.inputs for s in layers], [s.output_grads for s in layers], [s.bias is not None for s in layers])


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
