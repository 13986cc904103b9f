"""Contributions that can be had in one way only: no plan chooses, and one operator serves all of a kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .factors import Bias, Dense, Factor, Outer


@dataclass(slots=True)
class Singles:
    """Weights and biases of linear layers that met one vector per sample, of one dtype and device.

    Attributes:
        inputs: A of each layer, (B, n), with n = 0 if its weight is frozen.
        output_grads: E of each layer, (B, m).
        biases: whether its bias is trained.
    """

    inputs: list[Tensor]
    output_grads: list[Tensor]
    biases: list[bool]

    def gram(self) -> Tensor:
        """<h_i, h_j> over all, (B, B)."""
        return torch.ops.rgd_ext.ghost_gram(self.inputs, self.output_grads, self.biases)

    def combine(self, weights: Tensor) -> list[Tensor]:
        """sum_i w_i h_i, layer by layer, for a bias before its weight, (m,) and (m, n)."""
        there = weights.to(self.output_grads[0].device)
        return torch.ops.rgd_ext.ghost_combine(self.inputs, self.output_grads, self.biases, there)


class Aside:
    """What a backward gathers of linear layers with one vector per sample, and of rules that return tensors.

    In every step but the first it is what the step before planned, as a rule: small models pay for each operation here.
    """

    def __init__(self) -> None:
        # Trainable parameters by their names in the layer, inputs (B, n) and output gradients (B, m).
        self._layers: list[tuple[dict[str, nn.Parameter], Tensor, Tensor]] = []
        # Parameters and their contributions (B, *shape).
        self._formed: list[nn.Parameter] = []
        self.tensors: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._layers or self.tensors)

    def add_layer(self, parameters: dict[str, nn.Parameter], inputs: Tensor, output_grads: Tensor) -> None:
        """Keep one use of a linear layer."""
        self._layers.append((parameters, inputs, output_grads))

    def add_formed(self, parameter: nn.Parameter, contributions: Tensor) -> None:
        """Keep contributions that a rule formed."""
        self._formed.append(parameter)
        self.tensors.append(contributions)

    def signature(self) -> tuple:
        """All that its plan depends on."""
        layers = [(*map(id, layer.values()), x.shape, e.shape, e.dtype, e.device) for layer, x, e in self._layers]
        return layers, list(map(id, self._formed)), [(t.shape, t.dtype, t.device) for t in self.tensors]

    def parameters(self) -> list[nn.Parameter]:
        """Those of `tensors`, and those of `singles` in the order of their `combine`."""
        order = "bias", "weight"
        return self._formed + [layer[name] for layer, _, _ in self._layers for name in order if name in layer]

    def is_uniform(self) -> bool:
        """Whether no parameter took part twice, and all are of one dtype and device."""
        parameters = self.parameters()
        kinds = {(t.dtype, t.device) for t in self.tensors} | {(e.dtype, e.device) for _, _, e in self._layers}
        return len(set(parameters)) == len(parameters) and len(kinds) == 1

    @property
    def example(self) -> Tensor:
        """A tensor of its batch size, dtype and device, if it is uniform."""
        return self.tensors[0] if self.tensors else self._layers[0][2]

    def singles(self) -> Singles | None:
        """The linear layers, if it is uniform; None without any."""
        if not self._layers:
            return None
        inputs = [x if "weight" in layer else x[:, :0] for layer, x, _ in self._layers]
        return Singles(inputs, [e for _, _, e in self._layers], ["bias" in layer for layer, _, _ in self._layers])

    def factors(self) -> list[tuple[nn.Parameter, Factor]]:
        """The contributions one by one, whether it is uniform or not."""
        found: list[tuple[nn.Parameter, Factor]] = list(zip(self._formed, map(Dense, self.tensors), strict=True))
        for layer, x, e in self._layers:
            weight = Outer(x, e, torch.Size((e.shape[1], x.shape[1])))
            found += [(parameter, weight if name == "weight" else Bias(weight)) for name, parameter in layer.items()]
        return found
