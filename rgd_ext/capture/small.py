"""Layers so small that what surrounds their rules takes longer than the rules: done together, after the backward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor

from .._binary import _C
from .cost import SHARE
from .precision import full_precision

if TYPE_CHECKING:
    from .nodes import Record
    from .preconditioner import Preconditioner

# Bytes of inputs and output gradient. Measured: in the midst of a backward the code of a rule is not in the caches,
# which costs a convolution 40 us; what is larger would itself leave them.
SMALL = 64 << 10


class SmallLayers:
    """What small layers hand over in one backward.

    Args:
        most: bytes that those of `together` may hold, and all others.

    Attributes:
        together: of kinds that one operator serves, where it was compiled.
    """

    def __init__(self, most: int) -> None:
        self.together = None if _C is None else _C.Together(SMALL, most, SHARE)
        self._most, self._held = most, 0
        self._uses: list[tuple[Record, Collection[str], Sequence[Tensor], Tensor]] = []

    def begin(self, task: int, batch_size: int) -> None:
        """Forget all uses; those that `together` serves, of this backward and batch size, go there straight."""
        self._uses, self._held = [], 0
        if self.together is not None:
            self.together.begin(task, batch_size)

    def clear(self) -> None:
        """Forget all uses."""
        self.begin(-1, 0)

    def take(self, record: Record, names: Collection[str], inputs: Sequence[Tensor], grad: Tensor) -> bool:
        """Keep a use of a layer for the end of the backward, if it is small."""
        whole = len(names) == len(record.parameters)
        if self.together is not None and whole and self.together.take(record, inputs[0], grad):
            return True
        size = grad.nbytes
        for x in inputs:
            size += x.nbytes
        if size > SMALL or self._held + size > self._most:
            return False
        self._uses.append((record, names, inputs, grad))
        self._held += size
        return True

    def contribute(self, capture: Preconditioner) -> None:
        """Hand all contributions to `capture`: of `together` at once, of others one by one."""
        with ExitStack() as stack:
            for device in {grad.device for *_, grad in self._uses}:
                stack.enter_context(full_precision(device))
            for record, names, inputs, grad in self._uses:
                capture.contribute(record, names, record.contributions(inputs, grad))
        if self.together is not None:
            capture.aside.side_by_side += self.together.contribute()
        self.clear()
