"""The rows of the Jacobian of residuals, in the form in which layers contribute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ..contributions.ledger import Contributions
from .captures import capture_residuals
from .derivatives import Derivatives, InnerDerivative
from .handle import Preconditioner
from .native import LayerCall

T = TypeVar("T")
_BACKWARD_IN_CLOSURE = (
    "the closure ran a backward through the model: return the residuals, one or more for each sample, and leave"
    " backward() to step(closure). Derivatives with respect to inputs are torch.autograd.grad(u.sum(), x,"
    " create_graph=True)"
)


class Unproven(ValueError):  # noqa: N818
    """The rows are not those of the residuals, or the capture refuses to compute them."""


class ResidualCapture:
    """A capture of a model that computes residuals, for their Jacobian. Outside of it the model is an ordinary one.

    Args:
        model: the model.
        memory_budget: as for `precondition`.
        owner: the optimizer that the capture is for.

    Attributes:
        handle: of the capture.
    """

    def __init__(self, model: nn.Module, memory_budget: float | None, owner: torch.optim.Optimizer) -> None:
        self._model, self._memory_budget, self._owner = model, memory_budget, owner
        self._capture(is_unit=False)

    def _capture(self, is_unit: bool) -> None:
        self.handle: Preconditioner = capture_residuals(self._model, self._memory_budget, is_unit)
        self.handle.belongs_to(self._owner)

    @property
    def _derivatives(self) -> Derivatives:
        derivatives = self.handle.context.derivatives
        assert derivatives is not None  # of a capture for residuals
        return derivatives

    @property
    def mode(self) -> Literal["plain", "followed", "unit"]:
        """How derivatives of the model with respect to its inputs are captured so far."""
        if self.handle.context.options.is_unit:
            return "unit"
        return "followed" if self._derivatives.are_followed else "plain"

    def captured(self, run: Callable[[], T], again: Callable[[], T]) -> T:
        """The result of `run`, which uses `recording` and `rows`.

        Where derivatives with respect to inputs come up, they are followed from then on. What cannot be followed, or is
        wrong, is captured as one unit from then on, if that is right.

        Args:
            run: the first attempt; raises Unproven for rows that are wrong.
            again: puts back what the first attempt has changed, and repeats it.

        Raises:
            RuntimeError: for derivatives that cannot be captured.
            Unproven: as `run`.
            ValueError: that of a closure of the user.
        """
        try:
            return run()
        except (InnerDerivative, Unproven) as error:
            obstacle: Exception = error
        if self.mode == "plain" and isinstance(obstacle, InnerDerivative):
            self._derivatives.follow()
            try:
                return again()
            except (InnerDerivative, Unproven) as error:
                obstacle = error
        if self.mode != "unit":
            before = self.mode
            self._recapture(is_unit=True)
            try:
                return again()
            except Exception:  # the obstacle of the finer capture is what the user can mend
                self._recapture(is_unit=False)
            if before == "followed":
                self._derivatives.follow()
        if isinstance(obstacle, InnerDerivative):
            raise RuntimeError(str(obstacle)) from obstacle
        raise obstacle.__cause__ or obstacle  # the error of the closure itself, if it is one

    def _recapture(self, is_unit: bool) -> None:
        self.handle.remove()
        self._capture(is_unit)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards inside are recorded, and backwards through the model refused."""
        with self.handle.context.resumed(), self.handle.refusing(_BACKWARD_IN_CLOSURE):
            yield

    def rows(self, residuals: Tensor, parameters: Sequence[nn.Parameter], is_last: bool) -> Contributions | None:
        """The gradients of residuals with respect to some parameters, one residual for each sample.

        They are the contributions h_i of the samples to the gradient of the sum of the residuals, as long as residual i
        depends on sample i alone.

        Args:
            residuals: (B,), computed while `recording`.
            parameters: the parameters.
            is_last: whether the graph of the residuals is not needed any more.

        Returns:
            The contributions, or None if the residuals depend on none of the parameters.

        Raises:
            InnerDerivative: for derivatives with respect to inputs that the capture does not follow.
        """
        context = self.handle.context
        samples = LayerCall(context, context.native, "residuals", {}, len(residuals))
        with self._derivatives.of(samples), context.resumed(), self.handle.collect(keep=False) as found:
            torch.autograd.backward(residuals.sum(), inputs=list(parameters), retain_graph=not is_last)
        return found[0] if found else None
