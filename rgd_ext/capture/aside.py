"""Contributions that can be had in one way only: no plan chooses, and one operator serves all of a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .factors import Bias, Dense, Factor, Outer

if TYPE_CHECKING:
    from .nodes import Record

# Why there is but this way.
_TOGETHER = "small: formed together with others"
# Bytes of inputs and output gradients that are let go of at once: small models pay for each call.
_PIECE = 1 << 18


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

    def combine_and_release(self, weights: Tensor) -> list[Tensor]:
        """`combine`, which empties the lists on the way."""
        found = []
        while self.inputs:
            number = self._piece()
            found += Singles(self.inputs[:number], self.output_grads[:number], self.biases[:number]).combine(weights)
            del self.inputs[:number], self.output_grads[:number], self.biases[:number]
        return found

    def _piece(self) -> int:
        """How many of the first layers take no more than a piece; at least one."""
        size = 0
        for number, (x, e) in enumerate(zip(self.inputs, self.output_grads, strict=True)):
            size += x.nbytes + e.nbytes
            if size > _PIECE:
                return max(1, number)
        return len(self.inputs)


class Aside:
    """What a backward gathers of linear layers with one vector per sample, small layers, and rules that return tensors.

    In every step but the first it is what the step before planned, as a rule: small models pay for each operation here.
    """

    def __init__(self) -> None:
        # Trainable parameters by their names in the layer, inputs (B, n) and output gradients (B, m).
        self.layers: list[tuple[dict[str, nn.Parameter], Tensor, Tensor]] = []
        # Contributions (B, *shape), as a rule returned them for a parameter of some name.
        self.formed: list[tuple[Record, str, nn.Parameter, Tensor]] = []
        # Contributions of several parameters, flattened, side by side in one matrix (B, D).
        self.side_by_side: list[tuple[list[nn.Parameter], Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self.layers or self.formed or self.side_by_side)

    def signature(self) -> tuple:
        """All that its plan depends on."""
        layers = [(*map(id, layer.values()), x.shape, e.shape, e.dtype, e.device) for layer, x, e in self.layers]
        matrices = [(*map(id, parameters), t.shape, t.dtype, t.device) for parameters, t in self.side_by_side]
        return layers, [(id(p), t.shape, t.dtype, t.device) for _, _, p, t in self.formed], matrices

    def is_uniform(self) -> bool:
        """Whether no parameter took part twice, and all are of one dtype and device."""
        parameters = self.parameters()
        kinds = {(t.dtype, t.device) for t in self.tensors()} | {(p.dtype, p.device) for p in parameters}
        return len(set(parameters)) == len(parameters) and len(kinds) == 1

    def factors(self) -> list[tuple[nn.Parameter, Factor]]:
        """The contributions one by one, whether it is uniform or not.

        Raises:
            ValueError: if a rule returned another shape than (B, *shape).
        """
        found: list[tuple[nn.Parameter, Factor]] = [(entry[2], Dense(_checked(*entry))) for entry in self.formed]
        for parameters, matrix in self.side_by_side:
            parts = zip(parameters, matrix.split([p.numel() for p in parameters], 1), strict=True)
            found += [(p, Dense(part.view(len(part), *p.shape), why=_TOGETHER)) for p, part in parts]
        for layer, x, e in self.layers:
            weight = Outer(x, e, torch.Size((e.shape[1], x.shape[1])))
            found += [(parameter, weight if name == "weight" else Bias(weight)) for name, parameter in layer.items()]
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Those of `tensors`, and those of `singles` in the order of their `combine`."""
        order = "bias", "weight"
        formed = [parameter for _, _, parameter, _ in self.formed]
        formed += [parameter for parameters, _ in self.side_by_side for parameter in parameters]
        return formed + [layer[name] for layer, _, _ in self.layers for name in order if name in layer]

    def tensors(self) -> list[Tensor]:
        """What was formed, if it is uniform."""
        return [tensor for *_, tensor in self.formed] + [matrix for _, matrix in self.side_by_side]

    def apart(self, combined: list[Tensor]) -> list[Tensor]:
        """One tensor per parameter from one for each of `tensors`, without the samples' dimension."""
        whole = len(self.formed)
        found = combined[:whole]
        for (parameters, _), row in zip(self.side_by_side, combined[whole:], strict=True):
            # What changes one in place does not count as a change of the others.
            parts = zip(parameters, row.unsafe_split_with_sizes([p.numel() for p in parameters]), strict=True)
            found += [part if p.ndim == 1 else part.view(p.shape) for p, part in parts]
        return found

    def singles(self) -> Singles | None:
        """The linear layers, if it is uniform; None without any."""
        if not self.layers:
            return None
        inputs = [x if "weight" in layer else x.new_empty(len(x), 0) for layer, x, _ in self.layers]
        return Singles(inputs, [e for _, _, e in self.layers], ["bias" in layer for layer, _, _ in self.layers])


def _checked(record: Record, name: str, parameter: nn.Parameter, contributions: Tensor) -> Tensor:
    expected = (record.batch_size, *parameter.shape)
    if contributions.shape != expected:
        raise ValueError(
            f"the rule for '{record.name}' returned contributions of shape {tuple(contributions.shape)} for '{name}':"
            f" expected (B, *shape) = {expected}"
        )
    return contributions.to(parameter.dtype)
