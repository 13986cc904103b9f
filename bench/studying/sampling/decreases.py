"""Decreases of the loss by single steps, beside those of SGD and beside those with D of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from ..inference import Comparison, against
from .comparison import OWNERS, SGD


@dataclass(frozen=True, eq=False)
class Decreases:
    """Those by steps from the same points.

    Attributes:
        logarithms: by the name of the step, which is `SGD` or the owner of its D, and by seed.
    """

    logarithms: Mapping[str, Mapping[int, float]]

    @cached_property
    def gains(self) -> dict[str, Comparison]:
        """Logarithms less those of SGD, by owner of D."""
        return self._against(SGD, OWNERS)

    @cached_property
    def over_batch(self) -> dict[str, Comparison]:
        """The same less those with D of the batch, by other owner."""
        batch, *others = OWNERS
        return self._against(batch, others)

    def _against(self, baseline: str, names: Sequence[str]) -> dict[str, Comparison]:
        values = {name: list(self.logarithms[name].values()) for name in (baseline, *names)}
        return against(values[baseline], {name: values[name] for name in names})


def pooled(found: Sequence[Decreases]) -> Decreases | None:
    """The geometric means over several settings, by seed, of the seeds that all of them have; None if there is none.

    Trainings with the same seed are not independent, as they start from the same weights if they have the same data.
    So means are taken for each seed before they are compared.
    """
    of_all = [each.logarithms for each in found]
    seeds = sorted(set.intersection(*(set(each[SGD]) for each in of_all)))
    if not seeds:
        return None
    return Decreases(
        {name: {seed: fmean(each[name][seed] for each in of_all) for seed in seeds} for name in (SGD, *OWNERS)}
    )
