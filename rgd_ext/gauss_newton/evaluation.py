"""Evaluations of a closure: of its residuals alone, or with their Jacobian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..capture.residuals import ResidualCapture
from ..contributions.ledger import Contributions
from .jacobian import Jacobian
from .proof import prove
from .residuals import Closure, batches_of, columns_of, joined
from .snapshot import Snapshot

# The most unknowns of a linear system, by default: a matrix of 2 GiB.
_LARGEST_SYSTEM = 1 << 14
_NO_GRADIENT = (
    "the residuals depend on no trainable parameter of the model: compute them from its outputs inside of the closure,"
    " without torch.no_grad() or detach()"
)
_OTHER_SAMPLES = (
    "the closure returned residuals of shape {} for {} samples of the model: return one row for each sample, (B,) or"
    " (B, k), and several residuals of a sample along dimension 1, such as residuals.flatten(1)"
)


class Evaluator:
    """Evaluates closures at the parameters as they are.

    Args:
        capture: of the model that they call.
        is_double: as for `Jacobian`.
        max_rows: as for `GaussNewton`.
        verifies: whether the first Jacobian of each form is proven.
    """

    def __init__(self, capture: ResidualCapture, is_double: bool, max_rows: int | None, verifies: bool) -> None:
        self._capture, self._is_double, self._max_rows, self._verifies = capture, is_double, max_rows, verifies
        # The forms of residuals that have been proven.
        self._proven: set[tuple[object, ...]] = set()

    def snapshot(self) -> Snapshot:
        """What evaluations may change, as it is now.

        Raises:
            RuntimeError: if the capture was removed.
        """
        handle = self._capture.handle
        if handle.context.is_removed:
            raise RuntimeError("the capture of this GaussNewton was removed: make a new one, GaussNewton(model, ...)")
        return Snapshot(handle.model)

    @torch.enable_grad()
    def residuals(self, closure: Closure) -> Tensor:
        """All residuals, (N,), in float64; the model is not captured meanwhile."""
        return joined(batches_of(closure()))

    def linearised(
        self, closure: Closure, parameters: Sequence[nn.Parameter], start: Snapshot
    ) -> tuple[Jacobian, Tensor]:
        """The Jacobian of the residuals, and these, (N,), in float64.

        Args:
            closure: the closure.
            parameters: the Jacobian is with respect to these.
            start: what is restored where the closure has to run again.

        Raises:
            TypeError, ValueError: for residuals that cannot be, and if a proof fails.
            RuntimeError: if the closure runs a backward.
        """

        def run() -> tuple[Jacobian, list[Tensor]]:
            return self._with_graph(closure, parameters)

        def again() -> tuple[Jacobian, list[Tensor]]:
            start.restore()
            return run()

        jacobian, batches = self._capture.captured(run, again)
        residuals = joined(batches)
        form = (self._capture.way, self._capture.handle.model.training, *(batch.shape[1:] for batch in batches))
        if self._verifies and form not in self._proven and residuals.isfinite().all():
            after = self.snapshot()
            start.restore()
            try:
                self._prove(closure, jacobian, batches)
            finally:
                after.restore()
            self._proven.add(form)
        return jacobian, residuals

    @torch.enable_grad()
    def _prove(self, closure: Closure, jacobian: Jacobian, batches: Sequence[Tensor]) -> None:
        prove(jacobian, batches, batches_of(closure()), self._capture.handle.context.parameters.name_of)

    @torch.enable_grad()
    def _with_graph(self, closure: Closure, parameters: Sequence[nn.Parameter]) -> tuple[Jacobian, list[Tensor]]:
        """The Jacobian, and the residuals of each batch."""
        with self._capture.recording():
            batches = batches_of(closure())
        self._check_rows(sum(batch.numel() for batch in batches), sum(p.numel() for p in parameters))
        columns = columns_of(batches)
        parts: list[Contributions] = []
        for place, column in enumerate(columns):
            if not column.requires_grad:
                raise ValueError(_NO_GRADIENT)
            part = self._capture.rows(column, parameters, is_last=place == len(columns) - 1)
            if part is not None and part.batch_size != len(column):
                shapes = ", ".join(str((*batch.shape,)) for batch in batches)
                raise ValueError(_OTHER_SAMPLES.format(shapes, part.batch_size))
            parts.append(Contributions(len(column)) if part is None else part)
        if not any(parts):
            raise ValueError(_NO_GRADIENT)
        with torch.no_grad():
            return Jacobian(parts, self._is_double), batches

    def _check_rows(self, rows: int, weights: int) -> None:
        limit = self._max_rows
        if limit is None and weights > _LARGEST_SYSTEM:
            limit = _LARGEST_SYSTEM
        if limit is not None and rows > limit:
            raise ValueError(
                f"the closure returned {rows:,} residuals, and max_rows is {limit:,}: a matrix of {rows:,} rows and"
                f" columns takes {8 * rows**2 / 1e9:.1f} GB. Return those of a smaller batch, with adaptive=False if"
                f" batches change from step to step; or pass max_rows={rows}"
            )
