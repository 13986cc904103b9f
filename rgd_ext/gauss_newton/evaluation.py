"""Evaluations of a closure: of its residuals alone, or with their Jacobian."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..capture.findings import tolerance_of
from ..capture.precision import full_precision
from ..capture.residuals import ResidualCapture, Unproven
from ..contributions.ledger import Contributions
from .equations import Equations, equations
from .jacobian import Jacobian
from .proof import check_number, prove
from .residuals import Closure, batches_of, columns_of, joined
from .snapshot import Snapshot

# The most unknowns of a linear system, by default: a matrix of 2 GiB.
_LARGEST_SYSTEM = 1 << 14
_NO_GRADIENT = (
    "the residuals depend on no trainable parameter of the model: compute them from its outputs inside of the closure,"
    " without torch.no_grad() or detach(), and derivatives with create_graph=True"
)
_NOT_FINITE = (
    "residual {} is {} at the parameters before the step, which are as they were: start from parameters where all"
    " residuals are finite, or leave the sample out"
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
        verifies: whether Jacobians are proven: those of a new form, and those of steps 1, 2, 4, 8, ...
    """

    def __init__(self, capture: ResidualCapture, is_double: bool, max_rows: int | None, verifies: bool) -> None:
        self._capture, self._is_double, self._max_rows, self._verifies = capture, is_double, max_rows, verifies
        # The forms of residuals that have been proven.
        self._proven: set[tuple[object, ...]] = set()
        self._steps = 0

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
    def residuals(self, closure: Closure, number: int | None = None) -> Tensor:
        """All residuals, (N,), in float64; the model is not captured meanwhile.

        Raises:
            TypeError, ValueError: for what are no residuals, or others than `number`.
        """
        found = joined(batches_of(closure()))
        if number is not None:
            check_number(found, number)
        return found

    def equations(
        self, closure: Closure, parameters: Sequence[nn.Parameter], start: Snapshot, adaptive: bool
    ) -> Equations:
        """The equations of a step, proven.

        Args:
            closure: the closure.
            parameters: those that are fitted.
            start: what is restored where the closure has to run again.
            adaptive: whether the host waits for a GPU in any case.

        Raises:
            TypeError, ValueError: for invalid residuals, and if a proof fails.
            RuntimeError: if the closure runs a backward, or takes derivatives that cannot be captured.
        """
        self._steps += 1

        def run() -> Equations:
            jacobian, batches = self._with_graph(closure, parameters)
            residuals = joined(batches)
            with torch.no_grad():
                found = equations(jacobian, residuals, _waits(adaptive, residuals))
            if found.waits and not residuals.isfinite().all():
                place = int(residuals.isfinite().logical_not().nonzero()[0])
                raise ValueError(_NOT_FINITE.format(place, residuals[place].item()))
            self._prove(closure, parameters, found, batches, start)
            return found

        def again() -> Equations:
            start.restore()
            return run()

        return self._capture.captured(run, again)

    def _prove(
        self,
        closure: Closure,
        parameters: Sequence[nn.Parameter],
        found: Equations,
        batches: Sequence[Tensor],
        start: Snapshot,
    ) -> None:
        """Prove the rows if they are of a new form, and in steps 1, 2, 4, 8, ...

        Errors may not show at first, as behind weights that start with zero.
        """
        model = self._capture.handle.model
        form = (
            self._capture.mode,
            model.training,
            getattr(inspect.unwrap(closure), "__code__", None),
            *(b.shape for b in batches),
        )
        is_due = self._steps & (self._steps - 1) == 0 or form not in self._proven
        if not self._verifies or not is_due:
            return
        start.restore()
        with torch.enable_grad():
            again = batches_of(closure())
        tolerance = max(tolerance_of(p, autocast=True) for p in parameters)
        with torch.no_grad(), full_precision(found.residuals.device):
            prove(found, batches, again, parameters, tolerance, self._capture.handle.context.parameters.name_of)
        self._proven.add(form)

    @torch.enable_grad()
    def _with_graph(self, closure: Closure, parameters: Sequence[nn.Parameter]) -> tuple[Jacobian, list[Tensor]]:
        """The Jacobian, and the residuals of each batch."""
        with self._capture.recording():
            try:
                returned = closure()
            except ValueError as error:  # as a rule from the capture, which refuses what it cannot tell apart
                raise Unproven(str(error)) from error
        batches = batches_of(returned)
        self._check_rows(sum(batch.numel() for batch in batches), sum(p.numel() for p in parameters))
        columns = columns_of(batches)
        parts: list[Contributions] = []
        for place, column in enumerate(columns):
            if not column.requires_grad:
                raise Unproven(_NO_GRADIENT)
            part = self._capture.rows(column, parameters, is_last=place == len(columns) - 1)
            if part is not None and part.batch_size != len(column):
                shapes = ", ".join(str((*batch.shape,)) for batch in batches)
                raise ValueError(_OTHER_SAMPLES.format(shapes, part.batch_size))
            parts.append(Contributions(len(column)) if part is None else part)
        if not any(parts):
            raise Unproven(_NO_GRADIENT)
        with torch.no_grad():
            return Jacobian(parts, self._is_double), batches

    def _check_rows(self, rows: int, weights: int) -> None:
        limit = self._max_rows
        if limit is None and weights > _LARGEST_SYSTEM:
            limit = _LARGEST_SYSTEM
        if limit is not None and rows > limit:
            order = min(rows, weights)
            raise ValueError(
                f"the closure returned {rows:,} residuals, and max_rows is {limit:,}: the linear system has {order:,}"
                f" unknowns and takes {8 * order**2 / 1e9:.1f} GB. Return those of a smaller batch, with adaptive=False"
                f" if batches change from step to step; or pass max_rows={rows}"
            )


def _waits(adaptive: bool, residuals: Tensor) -> bool:
    """Whether the host may wait for the device to look at numbers."""
    return adaptive or not residuals.is_cuda
