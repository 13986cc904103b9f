"""The linear equations of a step, for the residuals or for the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cholesky import Factorised
from .jacobian import Jacobian

# A vector of the parameter space, one tensor for each parameter of a Jacobian.
Vector = list[Tensor]


@dataclass(frozen=True)
class Prior:
    """What pulls the step s beside the residuals: it adds sum_p m_p |s_p - q_p|^2 / 2 to |r - J s|^2 / 2.

    Attributes:
        metric: m_p for each parameter: damping plus weight decay.
        centre: q_p for each parameter, or None for zeros.
    """

    metric: list[float]
    centre: Vector | None


class Equations(ABC):
    """Finds the step s that minimises |r - J s|^2 / 2 + sum_p m_p |s_p - q_p|^2 / 2.

    Args:
        jacobian: J.
        residuals: r, (N,), in float64.
        waits: as for `Factorised`.

    Attributes:
        jacobian, residuals, waits: as given.
        jitter: what the last factorisation added to the diagonal.
    """

    def __init__(self, jacobian: Jacobian, residuals: Tensor, waits: bool) -> None:
        self.jacobian, self.residuals, self.waits = jacobian, residuals, waits
        self.jitter: float | Tensor = 0.0

    @property
    @abstractmethod
    def order(self) -> int:
        """The number of unknowns."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The largest element of the diagonal of the matrix, without the prior; to the order, once it is factorised."""

    @abstractmethod
    def row_norms(self) -> Tensor:
        """The norms of the rows of J, (N,)."""

    @abstractmethod
    def factorise(self, prior: Prior) -> None:
        """Prepare `step` and `correction` for a prior.

        Raises:
            Singular: if the equations have no solution.
        """

    @abstractmethod
    def step(self) -> Vector:
        """s."""

    @abstractmethod
    def correction(self, residuals: Tensor) -> Vector:
        """The s for other residuals, and without a centre."""

    def _factorised(self, matrix: Tensor) -> Factorised:
        found = Factorised(matrix, self.waits)
        self.jitter = found.jitter
        return found


class OfResiduals(Equations):
    """N equations: s = q + M^-1 J^T w, with (J M^-1 J^T + I) w = r - J q for the diagonal matrix M of the m_p.

    Both sides are multiplied by the smallest m_p, so that it may be zero if all of them are.
    """

    def __init__(self, jacobian: Jacobian, residuals: Tensor, waits: bool) -> None:
        super().__init__(jacobian, residuals, waits)
        # The Gramians of some of the parameters, by the places of these.
        self._grams: dict[tuple[int, ...], Tensor] = {}

    @property
    def order(self) -> int:
        return self.jacobian.rows

    @property
    def scale(self) -> float:
        return max(gram.diagonal().amax().item() for gram in self._grams.values())

    def row_norms(self) -> Tensor:
        return self._gram((*range(len(self.jacobian.parameters)),)).diagonal().clamp(min=0).sqrt()

    def _gram(self, places: tuple[int, ...]) -> Tensor:
        if places not in self._grams:
            self._grams[places] = self.jacobian.gram([self.jacobian.parameters[place] for place in places])
        return self._grams[places]

    def factorise(self, prior: Prior) -> None:
        smallest = min(prior.metric)
        self._prior, self._shares = prior, [smallest / m if m else 1.0 for m in prior.metric]
        places: dict[float, list[int]] = {}
        for place, share in enumerate(self._shares):
            places.setdefault(share, []).append(place)
        matrix = self.residuals.new_zeros(self.order, self.order)
        for share, each in places.items():
            matrix.add_(self._gram((*each,)), alpha=share)
        matrix.diagonal().add_(smallest)
        self._factors = self._factorised(matrix)

    def step(self) -> Vector:
        centre = self._prior.centre
        if centre is None:
            return self.correction(self.residuals)
        rest = self.correction(self.residuals - self.jacobian.times(centre))
        return [q.to(s) + s for q, s in zip(centre, rest, strict=True)]

    def correction(self, residuals: Tensor) -> Vector:
        step = self.jacobian.transposed_times(self._factors.solve(residuals))
        return [s if share == 1 else share * s for s, share in zip(step, self._shares, strict=True)]


class OfWeights(Equations):
    """d equations: (J^T J + M) s = J^T r + M q."""

    def __init__(self, jacobian: Jacobian, residuals: Tensor, waits: bool) -> None:
        super().__init__(jacobian, residuals, waits)
        self._matrix = residuals.new_zeros(jacobian.weights, jacobian.weights)
        for block in jacobian.blocks():
            self._matrix.addmm_(block.T, block)

    @property
    def order(self) -> int:
        return self.jacobian.weights

    @property
    def scale(self) -> float:
        return self._matrix.diagonal().amax().item()

    def row_norms(self) -> Tensor:
        return torch.cat([block.norm(dim=1) for block in self.jacobian.blocks()])

    def factorise(self, prior: Prior) -> None:
        sizes = [p.numel() for p in self.jacobian.parameters]
        self._metric = torch.cat([self._matrix.new_full((n,), m) for n, m in zip(sizes, prior.metric, strict=True)])
        self._centre = prior.centre
        matrix = self._matrix.clone()
        matrix.diagonal().add_(self._metric)
        self._factors = self._factorised(matrix)

    def step(self) -> Vector:
        right = self._right(self.residuals)
        return self._solved(right if self._centre is None else right + self._metric * _flat(self._centre))

    def correction(self, residuals: Tensor) -> Vector:
        return self._solved(self._right(residuals))

    def _right(self, residuals: Tensor) -> Tensor:
        """J^T r, (d,); in float64, unlike that of the Jacobian."""
        right, start = self._matrix.new_zeros(self.order), 0
        for block in self.jacobian.blocks():
            right += block.T @ residuals[start : start + len(block)]
            start += len(block)
        return right

    def _solved(self, right: Tensor) -> Vector:
        parameters = self.jacobian.parameters
        parts = self._factors.solve(right).split([p.numel() for p in parameters])
        return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def _flat(vector: Sequence[Tensor]) -> Tensor:
    return torch.cat([v.double().flatten() for v in vector])


def equations(jacobian: Jacobian, residuals: Tensor, waits: bool) -> Equations:
    """The system with fewer unknowns: that of the weights if d < N, else that of the residuals."""
    kind = OfWeights if jacobian.weights < jacobian.rows else OfResiduals
    return kind(jacobian, residuals, waits)
