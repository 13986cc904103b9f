"""Contributions of one dtype and device for which there is only one strategy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..gradients import Moments, squared_norm
from .factor import Dense, Factor
from .outer import Bias, Outer
from .vectors import VectorLayers


class Bucket:
    """Contributions of one dtype and device, which operators take all at once.

    Attributes:
        vectors: linear layers that met one vector per sample.
        vector_parameters: the parameters of these layers, the bias of a layer before its weight.
        tensors: contributions (B, *shape), or (B, D) of several parameters, flattened and side by side.
        owners: the parameters of each tensor.
    """

    __slots__ = ("owners", "tensors", "vector_parameters", "vectors")

    def __init__(self) -> None:
        self.vectors = VectorLayers()
        self.vector_parameters: list[nn.Parameter] = []
        self.tensors: list[Tensor] = []
        self.owners: list[Sequence[nn.Parameter]] = []

    def add_vectors(self, parameters: Sequence[nn.Parameter], layers: VectorLayers) -> None:
        """Add linear layers and their parameters."""
        self.vectors.extend(layers)
        self.vector_parameters += parameters

    def add_tensor(self, owners: Sequence[nn.Parameter], tensor: Tensor) -> None:
        """Add a tensor and its parameters."""
        self.tensors.append(tensor)
        self.owners.append(owners)

    def combine_vectors(self, weights: Tensor, last: bool) -> list[Tensor]:
        """sum_i w_i h_i for `vector_parameters`. If it is the `last` time, the layers are not kept."""
        combined = self.vectors.combine(weights, last) if self.vectors else []
        return in_shapes(combined, self.vector_parameters)

    def combine_vectors_one_by_one(self, weights: Tensor, last: bool) -> Iterator[Tensor]:
        """The parts of `combine_vectors`, each as soon as it is computed."""
        parameters = iter([*self.vector_parameters])
        for step in self.vectors.combine_one_by_one(weights, last):
            yield step.view(next(parameters).shape)

    @property
    def has_exact_sums(self) -> bool:
        """Whether B times a mean has the bits of the sum: a power of two only changes exponents.

        Subnormal numbers lose digits by it. In float16 gradients often are, in wider dtypes only below 1e-37.
        """
        batch_size, dtype = len(self.tensors[0]), self.tensors[0].dtype
        return batch_size & (batch_size - 1) == 0 and dtype != torch.float16

    def combine_tensors(self, weights: Tensor, last: bool) -> list[Tensor]:
        """sum_i w_i h_i for each of `tensors`, which are not kept if it is the `last` time."""
        if not self.tensors:
            return []
        combined = torch.ops.rgd_ext.combine(self.tensors, weights.to(self.tensors[0].device))
        if last:
            self.tensors = []
        return combined

    def layers(self) -> Iterator[tuple[nn.Parameter | None, nn.Parameter | None, Tensor, Tensor]]:
        """The weight, the bias, the inputs and the output gradients of each linear layer."""
        parameters = iter(self.vector_parameters)
        for x, e, has_bias in self.vectors:
            bias = next(parameters) if has_bias else None
            yield (next(parameters) if x.shape[1] else None), bias, x, e

    def vector_factors(self) -> list[tuple[nn.Parameter, Factor]]:
        """The contributions of the linear layers, parameter by parameter."""
        return [each for layer in self.layers() for each in layer_factors(*layer)]

    def tensor_factors(self) -> list[tuple[nn.Parameter, Factor]]:
        """The contributions in tensors, parameter by parameter."""
        pairs = zip(self.owners, self.tensors, strict=True)
        return [(p, Dense(part)) for owners, tensor in pairs for p, part in split_by_owner(owners, tensor)]


def moments_and_sums(tensors: list[Tensor]) -> tuple[Moments, list[Tensor]]:
    """The moments of contributions (B, *shape), and sum_i h_i for each, in one read, for a B that `has_exact_sums`."""
    mean, alignments, squared_norms = torch.ops.rgd_ext.moments(tensors)
    sums = list(torch._foreach_mul(mean, float(len(tensors[0]))))
    return Moments(squared_norm(mean), alignments, squared_norms), sums


def in_shapes(tensors: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Tensors with as many elements as the parameters have, in the shapes of the parameters."""
    pairs = zip(tensors, parameters, strict=True)
    return [tensor if tensor.shape == p.shape else tensor.view(p.shape) for tensor, p in pairs]


def layer_factors(
    weight: nn.Parameter | None, bias: nn.Parameter | None, x: Tensor, e: Tensor
) -> list[tuple[nn.Parameter, Factor]]:
    """The factors of a linear layer, the bias before the weight."""
    shape = torch.Size((e.shape[1], x.shape[1])) if weight is None else weight.shape
    layer = Outer(x, e, shape)
    found: list[tuple[nn.Parameter, Factor]] = [] if bias is None else [(bias, Bias(layer))]
    return found if weight is None else [*found, (weight, layer)]


def split_by_owner(owners: Sequence[nn.Parameter], tensor: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """The part of each parameter, (B, *shape), in a tensor of the buckets."""
    parts = [tensor] if len(owners) == 1 else tensor.split([p.numel() for p in owners], 1)
    return [(p, part.view(len(part), *p.shape)) for p, part in zip(owners, parts, strict=True)]
