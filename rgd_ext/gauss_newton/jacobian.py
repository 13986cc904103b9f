"""The Jacobian of the residuals as a linear operator."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..capture.precision import full_precision
from ..contributions.factor import Dense, Factor
from ..contributions.ledger import Contributions
from ..contributions.merge import concatenate_batches, in_double
from ..linalg import accumulate_dtype


class Jacobian:
    """J, (N, d), of N residuals with respect to the parameters that they depend on; it is not formed.

    Vectors of the parameter space are lists with one tensor (*shape) for each parameter. Those of the residuals, (N,),
    and the Gramian are in float64.

    Args:
        parts: the gradients of the residuals as contributions, batch after batch.
        is_double: whether products are computed in float64 for parameters of lower precision as well.

    Attributes:
        rows: N.
        weights: d.
        parameters: those that the residuals depend on.
    """

    def __init__(self, parts: Sequence[Contributions], is_double: bool) -> None:
        self._parts = [_in_double(part) for part in parts] if is_double else parts
        self._whole = _union(self._parts)
        self.rows, self.parameters = self._whole.batch_size, self._whole.parameters()
        self.weights = sum(p.numel() for p in self.parameters)

    def gram(self, parameters: Collection[nn.Parameter]) -> Tensor:
        """The sum over some parameters of J_p J_p^T, (N, N)."""
        part = self._whole
        if len(parameters) < len(self.parameters):
            own = set(parameters)
            part = Contributions.of([(p, factor) for p, factor in part.factors() if p in own], self.rows)
        with self._precisely():  # contributions are those of the mean, over as many samples: G = N J
            return part.gram().double().div_(self.rows**2)

    def times(self, vector: Sequence[Tensor]) -> Tensor:
        """J v."""
        with self._precisely():
            return self._whole.align([*vector]).double() / self.rows

    def transposed_times(self, vector: Tensor) -> list[Tensor]:
        """J^T v, in the dtypes of the parameters, or float64."""
        dtype = accumulate_dtype(self._whole.factors()[0][1].example.dtype)
        with self._precisely():
            return self._whole.combine(vector.to(dtype) / self.rows)

    def blocks(self) -> Iterator[Tensor]:
        """Rows of J, (some of N, d), one block after another."""
        for part in self._parts:
            found = dict(part.factors())
            with self._precisely():
                columns = [
                    found[p].dense().double().view(part.batch_size, -1)
                    if p in found
                    else p.new_zeros(part.batch_size, p.numel(), dtype=torch.float64)
                    for p in self.parameters
                ]
            yield torch.cat(columns, 1)

    def _precisely(self) -> AbstractContextManager[object, bool | None]:
        return full_precision(self.parameters[0].device)


def _union(parts: Sequence[Contributions]) -> Contributions:
    """The contributions of all parts as those of one batch."""
    if len(parts) == 1:
        return parts[0]
    found = [dict(part.factors()) for part in parts]
    sizes = [part.batch_size for part in parts]

    def of_all(p: nn.Parameter) -> Factor:
        """The contributions to `p`; zeros in parts that do not depend on it."""
        return concatenate_batches(
            [
                factors[p] if p in factors else Dense(p.detach().new_zeros(size, *p.shape))
                for factors, size in zip(found, sizes, strict=True)
            ]
        )

    parameters = dict.fromkeys(p for part in parts for p in part.parameters())
    return Contributions.of([(p, of_all(p)) for p in parameters], sum(sizes))


def _in_double(contributions: Contributions) -> Contributions:
    return Contributions.of([(p, in_double(factor)) for p, factor in contributions.factors()], contributions.batch_size)
