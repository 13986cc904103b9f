"""The shapes of the contributions of a backward, which outlive their values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .factor import Dense, Factor, blank
from .outer import Bias, Outer

# Why contributions that lie side by side are formed, for the user.
_TOGETHER = "small: formed together with others"


class Outline:
    """The shapes of contributions with only one strategy.

    Args:
        batch_size: B.
        buckets: the parameters of linear layers that met one vector per sample, and the owners of tensors.
    """

    def __init__(self, batch_size: int, buckets: list[tuple[list[nn.Parameter], list[Sequence[nn.Parameter]]]]) -> None:
        self._batch_size, self._buckets = batch_size, buckets

    def factors(self) -> list[tuple[nn.Parameter, Factor]]:
        """Factors of the right shapes, by parameter."""
        found: list[tuple[nn.Parameter, Factor]] = []
        for vector_parameters, tensors in self._buckets:
            found += [(parameter, self._of_vectors(parameter)) for parameter in vector_parameters]
            for owners in tensors:
                why = () if len(owners) == 1 else (_TOGETHER,)
                found += [(p, Dense(self._blank(p, *p.shape), False, *why)) for p in owners]
        return found

    def _of_vectors(self, parameter: nn.Parameter) -> Factor:
        rows, columns = parameter.shape[0], parameter.shape[1:].numel() if parameter.ndim > 1 else 0
        layer = Outer(self._blank(parameter, columns), self._blank(parameter, rows), parameter.shape)
        return layer if parameter.ndim > 1 else Bias(layer)

    def _blank(self, parameter: nn.Parameter, *shape: int) -> Tensor:
        return blank(parameter.detach(), self._batch_size, *shape)
