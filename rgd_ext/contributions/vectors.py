"""Linear layers that met one vector per sample, whose gradients are never formed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Bytes of inputs and output gradients that are let go of at once: small models pay for each call.
_PIECE = 1 << 18


@dataclass(slots=True)
class VectorLayers:
    """Weights and biases of linear layers, of one dtype and device.

    Attributes:
        inputs: A of each layer, (B, n), with n = 0 if its weight is frozen.
        output_grads: E of each layer, (B, m).
        biases: whether its bias is trained.
    """

    inputs: list[Tensor] = field(default_factory=list)
    output_grads: list[Tensor] = field(default_factory=list)
    biases: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        return zip(self.inputs, self.output_grads, self.biases, strict=True)

    def extend(self, layers: VectorLayers) -> None:
        """Add more layers of the same dtype and device."""
        self.inputs += layers.inputs
        self.output_grads += layers.output_grads
        self.biases += layers.biases

    def gram(self) -> Tensor:
        """<h_i, h_j> over all layers, (B, B)."""
        return torch.ops.rgd_ext.ghost_gram(self.inputs, self.output_grads, self.biases)

    def combine(self, weights: Tensor, last: bool = False) -> list[Tensor]:
        """sum_i w_i h_i, layer by layer, for a bias before its weight, (m,) and (m, n).

        Args:
            weights: w, (B,).
            last: the layers are not needed any more, and the lists are emptied on the way.
        """
        if last:
            return [*self.combine_one_by_one(weights, last)]
        there = weights.to(self.output_grads[0].device)
        return torch.ops.rgd_ext.ghost_combine(self.inputs, self.output_grads, self.biases, there)

    def combine_one_by_one(self, weights: Tensor, last: bool) -> Iterator[Tensor]:
        """The parts of `combine`, each as soon as it is computed."""
        rest = self if last else VectorLayers([*self.inputs], [*self.output_grads], [*self.biases])
        there = weights.to(self.output_grads[0].device) if self.inputs else weights
        while rest.inputs:
            n = rest._piece()
            piece = rest.inputs[:n], rest.output_grads[:n], rest.biases[:n]
            yield from torch.ops.rgd_ext.ghost_combine(*piece, there)
            del piece, rest.inputs[:n], rest.output_grads[:n], rest.biases[:n]

    def _piece(self) -> int:
        """How many of the first layers take no more than a piece; at least one."""
        size = 0
        for number, (x, e) in enumerate(zip(self.inputs, self.output_grads, strict=True)):
            size += x.nbytes + e.nbytes
            if size > _PIECE:
                return max(1, number)
        return len(self.inputs)
