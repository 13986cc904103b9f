"""The mean gradient of several processes, most of which is on its way while their backwards still run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..contributions.factor import Factor
from ..contributions.ledger import Contributions
from ..linalg import accumulate_dtype
from .buckets import BucketReducer, Layout, all_reduced
from .group import Group


class MeanExchange:
    """The exchange of the mean gradient in one backward.

    The part of a large parameter is complete when it has had as many uses as in the backward before. What comes later
    than that is exchanged once more, at the end.

    Args:
        layout: of the buckets.
        group: the processes.
        expected: how many uses each large parameter had in the backward before, by its id.
        check: called before the first bucket leaves; raises if the processes do not do the same.

    Attributes:
        use_counts: how many uses each large parameter has had, by its id.
        own: the gradient of this process's loss, divided by the number of processes, by parameter.
        mean: that of the mean of all losses, which is the sum of these; bucket by bucket as `reduced_buckets` gives
            them out.
    """

    def __init__(self, layout: Layout, group: Group, expected: Mapping[int, int], check: Callable[[], object]) -> None:
        self._group, self._expected, self._check = group, expected, check
        self.use_counts: Counter[int] = Counter()
        self.own: dict[nn.Parameter, Tensor] = {}
        self.mean = layout.empty()
        self._reducer = BucketReducer.of_vector(self.mean, group, "the mean gradient")
        self._late: dict[nn.Parameter, Tensor] = {}

    @classmethod
    def of(cls, layout: Layout, group: Group, local: Contributions) -> MeanExchange:
        """The exchange at the end of a backward, nothing of which has left before, and which keeps nothing in `own`.

        Args:
            layout, group: as above.
            local: all contributions of this process.
        """
        found = cls(layout, group, {}, _nothing)
        for parameter, part in found._shares(local):
            found._reducer.fill(parameter, part)
        found._reducer.fill_zeros()
        return found

    def offer(self, parameter: nn.Parameter, factor: Factor) -> None:
        """Take the contributions of one use of a large parameter, and send what is complete."""
        if parameter not in self.mean.parts:
            return
        key, part = id(parameter), self._share(parameter, factor)
        if self._reducer.is_filled(parameter):
            self._late[parameter] = self._late[parameter] + part if parameter in self._late else part
        self.own[parameter] = self.own[parameter] + part if self.use_counts[key] else part
        self.use_counts[key] += 1
        if self.use_counts[key] == self._expected.get(key):
            self._check()
            self._reducer.fill(parameter, self.own[parameter])

    def _share(self, parameter: nn.Parameter, factor: Factor) -> Tensor:
        dtype = accumulate_dtype(parameter.dtype)
        weights = torch.full((factor.batch_size,), 1 / self._group.size, dtype=dtype, device=parameter.device)
        return factor.combine(weights).to(dtype)

    def _shares(self, contributions: Contributions) -> Iterator[tuple[nn.Parameter, Tensor]]:
        if contributions:
            first, share = contributions.parameters()[0], 1 / (contributions.batch_size * self._group.size)
            dtype = accumulate_dtype(first.dtype)
            weights = torch.full((contributions.batch_size,), share, dtype=dtype, device=first.device)
            for parameter, part in contributions.combine_by_parameter(weights):
                yield parameter, part.to(accumulate_dtype(parameter.dtype))

    def take_own(self, parameter: nn.Parameter, factor: Factor | None) -> Tensor | None:
        """The part of `own`, which is not kept any longer; None without contributions.

        Args:
            parameter: the parameter.
            factor: its contributions in this process, from which it is computed if it was not kept.
        """
        own = self.own.pop(parameter, None)
        return self._share(parameter, factor) if own is None and factor is not None else own

    def send_rest(self, local: Contributions) -> bool:
        """Send what has not left, at the end of the backward; whether something came late here.

        Args:
            local: all contributions of this process, of which some were offered.
        """
        rest = local.without(self.use_counts.keys()) if self.use_counts else local
        self.own.update(self._shares(rest))
        for parameter, part in self.own.items():
            if not self._reducer.is_filled(parameter):
                self._reducer.fill(parameter, part)
        self._reducer.fill_zeros()
        return bool(self._late)

    def reduced_buckets(self, is_late: bool) -> Iterator[int]:
        """The number of each bucket, when its part of `mean` is there.

        Args:
            is_late: whether something came late in any process.
        """
        what, late = "parts of the mean gradient that came late", None
        if is_late:
            late = all_reduced(self.mean.layout, self._group, what, self._late.items())
        for bucket, _ in self._reducer.reduced_buckets():
            if late is not None:
                self.mean.buffers[bucket].add_(late.buffers[bucket])
            yield bucket


def _nothing() -> None:
    """The processes have been compared before."""
