"""Linear layers with one vector per sample: their gradients are never formed, and take one operator for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .factors import Bias, Factor, Outer


@dataclass(slots=True)
class Singles:
    """Weights and biases of layers that met one vector per sample, of one dtype and device.

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

    def factors(self) -> list[Factor]:
        """One for each parameter, in the order of `combine`."""
        found: list[Factor] = []
        for x, e, has_bias in zip(self.inputs, self.output_grads, self.biases, strict=True):
            outer = Outer(x, e, torch.Size((e.shape[1], x.shape[1])))
            found += [Bias(outer)] * has_bias + [outer] * (x.shape[1] > 0)
        return found


class Aside:
    """What such layers gave to a backward, kept as it is until its end.

    In every step but the first it is what the step before planned, as a rule: small models pay for each operation here.
    """

    def __init__(self) -> None:
        # Trainable parameters by their names in the layer, inputs (B, n) and output gradients (B, m).
        self._uses: list[tuple[dict[str, nn.Parameter], Tensor, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._uses)

    def add(self, parameters: dict[str, nn.Parameter], inputs: Tensor, output_grads: Tensor) -> None:
        """Keep one use of a layer."""
        self._uses.append((parameters, inputs, output_grads))

    def signature(self) -> list[tuple]:
        """All that its plan depends on."""
        return [(*map(id, layer.values()), x.shape, e.shape, e.dtype, e.device) for layer, x, e in self._uses]

    def parameters(self) -> list[nn.Parameter]:
        """In the order of `Singles.combine`."""
        order = "bias", "weight"
        return [layer[name] for layer, _, _ in self._uses for name in order if name in layer]

    def is_uniform(self) -> bool:
        """Whether `singles` serves: no parameter took part twice, and all are of one dtype and device."""
        parameters = self.parameters()
        return len(set(parameters)) == len(parameters) and len({(e.dtype, e.device) for _, _, e in self._uses}) == 1

    def singles(self) -> Singles:
        """The contributions to `parameters`."""
        inputs = [x if "weight" in layer else x[:, :0] for layer, x, _ in self._uses]
        return Singles(inputs, [e for _, _, e in self._uses], ["bias" in layer for layer, _, _ in self._uses])

    def factors(self) -> list[tuple[nn.Parameter, Factor]]:
        """The contributions one by one, layer by layer."""
        found: list[tuple[nn.Parameter, Factor]] = []
        for layer, x, e in self._uses:
            weight = Outer(x, e, torch.Size((e.shape[1], x.shape[1])))
            found += [(parameter, weight if name == "weight" else Bias(weight)) for name, parameter in layer.items()]
        return found
