"""The memory of `Spectral(every=...)`."""

from __future__ import annotations

import torch
from torch import Tensor

from .rules import State
from .stats import Statistics


class EigenvalueShare:
    """lambda_max / tr D over a sequence of batches, for `Spectral(every=...)`.

    It is measured in every `every`-th batch; in the batches between, lambda_max is estimated from the last value.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._batches = 0
        self._share: Tensor | None = None

    @property
    def is_due(self) -> bool:
        """Whether the next batch is one in which it is measured, for which the Gramian is needed."""
        return self._share is None or self._batches % self.every == 0

    def update(self, stats: Statistics) -> None:
        """Measure it in the statistics of the next batch, or have these estimate lambda_max by it."""
        if self.is_due:
            share = torch.div(stats.largest_eigenvalue, stats.trace)  # type: ignore[arg-type]  # Spectral has it
            # Where D = 0, or where gradients have overflowed, the last value stays; at first the largest possible one.
            known = torch.ones_like(share) if self._share is None else self._share.to(share)
            self._share = torch.where(share.isfinite(), share, known)
        else:
            stats.estimate_largest_eigenvalue(self._share)  # type: ignore[arg-type]  # measured in the first batch
        self._batches += 1

    def state_dict(self) -> State:
        """The number of batches there were, and the last share."""
        return {"batches": self._batches, "share": self._share}

    def load_state_dict(self, state: State) -> None:
        """Go on after the batches of `state`, from `state_dict`; ValueError for another."""
        batches, share = (state.get("batches"), state.get("share")) if isinstance(state, dict) else (None, None)
        is_share = share is None or (isinstance(share, Tensor) and share.shape == () and share.is_floating_point())
        if type(batches) is not int or batches < 0 or not is_share:
            raise ValueError(
                f"{state!r} is not a state of Spectral(every=...): expected 'batches', a number, and 'share', a scalar"
                " tensor or None, as state_dict() gives them"
            )
        self._batches, self._share = batches, share
