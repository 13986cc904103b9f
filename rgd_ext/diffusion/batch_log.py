"""What the first pass over a data set saw, to which every later pass is compared."""

from __future__ import annotations

import math
from collections.abc import Iterable

# The largest relative difference between two evaluations of one loss, on whatever device.
_SAME_LOSS = 1e-4


class DifferenceError(RuntimeError):
    """A pass sees something else than the first pass did."""


class BatchLog:
    """For each batch of the first pass, a hash of its data and its loss."""

    def __init__(self, digests: Iterable[str] = (), losses: Iterable[float] = ()) -> None:
        self.digests, self.losses = list(digests), list(losses)

    def check_data(self, index: int, digest: str, may_add: bool = False) -> None:
        """Raise DifferenceError if the data of batch `index` differs; with `may_add` a new batch is recorded."""
        if may_add and index == len(self.digests):
            self.digests.append(digest)
        if index >= len(self.digests) or self.digests[index] != digest:
            raise DifferenceError(
                f"batch {index} differs from that of the first pass: the data has changed, or the loader shuffles or"
                " augments; use shuffle=False, the same batch size, and no random transforms"
            )

    def check_loss(self, index: int, loss: float, may_add: bool = False) -> None:
        """Raise DifferenceError if the loss of batch `index` differs; with `may_add` a new batch is recorded."""
        if may_add and index == len(self.losses):
            self.losses.append(loss)
        before = self.losses[index]
        if not math.isclose(loss, before, rel_tol=_SAME_LOSS, abs_tol=1e-12):
            raise DifferenceError(
                f"the loss of batch {index} is {loss:.6g}, in the first pass it was {before:.6g}: the model or the loss"
                " is random; switch that off"
            )

    def check_end(self, count: int) -> None:
        """Raise ValueError if there were no batches, DifferenceError if there were fewer than in the first pass."""
        if count == 0:
            raise ValueError("loader is empty: pass at least one batch (x, y)")
        if count < len(self.losses):
            raise DifferenceError(
                f"the loader gave {count} batches, but {len(self.losses)} in the first pass: use the same data in every"
                " pass"
            )
