"""Layers so small that what surrounds their rules takes longer than the rules: done together, after the backward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .precision import full_precision
from .rules import FORMED, Formed

if TYPE_CHECKING:
    from .nodes import Record
    from .preconditioner import Preconditioner

# Bytes of inputs and output gradient. Measured: in the midst of a backward the code of a rule is not in the caches,
# which costs a convolution 40 us; what is larger would itself leave them.
SMALL = 64 << 10
# The parameters that `layer_grads` forms gradients of.
_AFFINE = (["weight"], ["weight", "bias"])


class SmallLayers:
    """What small layers hand over in one backward.

    Args:
        most: bytes that all together may hold.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._uses: list[tuple[Record, Collection[str], Sequence[Tensor], Tensor]] = []

    def take(self, record: Record, names: Collection[str], inputs: Sequence[Tensor], grad: Tensor) -> bool:
        """Keep a use of a layer for the end of the backward, if it is small."""
        size = grad.nbytes
        for x in inputs:
            size += x.nbytes
        if size > SMALL or self._held + size > self._most:
            return False
        self._uses.append((record, names, inputs, grad))
        self._held += size
        return True

    def clear(self) -> None:
        """Forget all uses."""
        self._uses, self._held = [], 0

    def contribute(self, capture: Preconditioner) -> None:
        """Hand all contributions to `capture`: of the layers that `layer_grads` serves at once, others one by one."""
        # By dtype and device.
        groups: dict[tuple, tuple[list[nn.Parameter], list[Formed]]] = {}
        with ExitStack() as stack:
            for device in {grad.device for *_, grad in self._uses}:
                stack.enter_context(full_precision(device))
            for record, names, inputs, grad in self._uses:
                formed = _formed(record, names, inputs[0], grad)
                if formed is None:
                    capture.contribute(record, names, record.contributions(inputs, grad))
                    continue
                parameters, layers = groups.setdefault((grad.dtype, grad.device), ([], []))
                parameters += record.parameters.values()
                layers.append((*formed, len(names) > 1))
            for parameters, layers in groups.values():
                matrix = torch.ops.rgd_ext.layer_grads(*map(list, zip(*layers, strict=True)))
                capture.aside.side_by_side.append((parameters, matrix))
        self.clear()


def _formed(record: Record, names: Collection[str], x: Tensor, grad: Tensor) -> Formed | None:
    """What `layer_grads` takes of a use, but for whether there is a bias; None if it does not serve the layer."""
    find, parameters = FORMED.get(id(getattr(record.rule, "func", None))), record.parameters
    if find is None or list(names) not in _AFFINE or len(names) < len(parameters):
        return None
    return find(record.rule.args[0], x, grad) if x.dtype == grad.dtype == parameters["weight"].dtype else None
