"""The parameters of a captured model: as its layers use them, and as optimizers step them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from ..contributions.ledger import Contributions
from .agreement import checksum
from .buckets import Layout


class Comparison(NamedTuple):
    """What of a parameter has to be equal in several processes.

    Attributes:
        what: its name in an error.
        number: computes the number that stands for it.
        replica_groups: a number for each rank, if only ranks with the same one have to agree.
    """

    what: str
    number: Callable[[], int]
    replica_groups: tuple[int, ...] = ()


class ModelParameters:
    """The parameters of a model that each process has whole: optimizers step what layers use.

    Args:
        model: the model.

    Attributes:
        model: as given.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._layouts: list[Layout] = []
        self._ids: list[int] = []

    @property
    def is_sharded(self) -> bool:
        """Whether each process has shards of them."""
        return False

    def used(self) -> list[tuple[str, nn.Parameter]]:
        """Those that layers use, and their names, as the model lists them; some may have been replaced since before."""
        return [*self.model.named_parameters()]

    def stepped(self) -> list[tuple[str, nn.Parameter]]:
        """Those that optimizers step, which have `.grad`, in the same order."""
        return [*self.model.named_parameters()]

    def stepped_of(self, used: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those that optimizers step in the place of some that layers use."""
        return [*used]

    def is_temporary(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter of the model is there until the backward only, and neither used nor stepped."""
        return False

    def aliases(self) -> dict[str, str]:
        """For each name of a parameter the first one, which differs where it is tied."""
        first = {parameter: name for name, parameter in self.model.named_parameters()}
        return {name: first[p] for name, p in self.model.named_parameters(remove_duplicate=False)}

    def restore_stepped(self) -> None:
        """Put what optimizers step into the model, before its `.grad` is written.

        Raises:
            RuntimeError: if the model has been sharded otherwise since the capture.
        """

    def layouts(self) -> list[Layout]:
        """The trainable parameters, in blocks; the same list as before if they are the same.

        A vector is exchanged block by block, so that no more than one block of it has to be in memory.
        """
        named = [(name, p) for name, p in self.used() if p.requires_grad and p.numel()]
        ids = [id(p) for _, p in named]
        if ids != self._ids:
            self._layouts, self._ids = self._blocks(named), ids
        return self._layouts

    def _blocks(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[Layout]:
        return [Layout(named)]

    def compared(self, name: str, parameter: nn.Parameter) -> Comparison:
        """What has to be equal in several processes of a parameter, given as `stepped` does."""
        return Comparison(f"the value of parameter '{name}'", partial(checksum, parameter))

    def split(self, contributions: Contributions, layouts: Sequence[Layout]) -> list[Contributions]:
        """The contributions to each of the blocks; `contributions` may be empty afterwards."""
        return [contributions]
