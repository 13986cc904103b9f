"""The parameter space in blocks, and which of its parameters the processes use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..contributions.ledger import Contributions
from .buckets import Layout
from .sharding import gathered

_PARTLY = (
    "per_parameter=True, and only some of the processes use parameter '{}', so that its noise scale would mix samples"
    " that use it with others that cannot: let every process use it in each backward, or observe without per_parameter"
)


class Block(NamedTuple):
    """A part of the parameter space, whose vectors are exchanged at once.

    Attributes:
        layout: of these vectors.
        local: the contributions of this process to its parameters, which may have none.
    """

    layout: Layout
    local: Contributions


class UsedParameters:
    """Which parameters the processes use in a backward.

    Args:
        layouts: of the vectors that are exchanged.
        anywhere: whether any process uses each parameter of the layouts.
        everywhere: whether all processes that have samples use it.

    Attributes:
        parameters: of the layouts.
    """

    def __init__(self, layouts: Sequence[Layout], anywhere: list[bool], everywhere: list[bool]) -> None:
        self.parameters = [p for layout in layouts for p in layout.parameters]
        self._names = [name for layout in layouts for name in layout.names]
        self._anywhere, self._everywhere = anywhere, everywhere

    def anywhere(self) -> list[nn.Parameter]:
        """The parameters that any process uses."""
        return [p for p, is_used in zip(self.parameters, self._anywhere, strict=True) if is_used]

    def check_complete(self) -> None:
        """Raise RuntimeError if only some of the processes with samples use a parameter."""
        for name, anywhere, everywhere in zip(self._names, self._anywhere, self._everywhere, strict=True):
            if anywhere and not everywhere:
                raise RuntimeError(_PARTLY.format(name))


def aligned_parts(blocks: Sequence[Block], vectors: Mapping[nn.Parameter, Tensor]) -> list[Tensor]:
    """The products of a vector, given by parameter, with this process's gradients, (B_r,) for each block.

    Where each process has shards of the vector, this is an exchange.
    """
    found = []
    for block in blocks:
        parts = {p: gathered(vectors[p]) for p in block.layout.parameters if p in vectors}
        if block.local:
            found.append(block.local.align_by_parameter(parts))
    return found
