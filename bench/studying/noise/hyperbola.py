"""The trade-off between the number of steps and the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

LARGEST = 1e6  # samples; a critical batch size beyond that of every fit


@dataclass(frozen=True)
class Hyperbola:
    """S(B) = S_min (1 + B_crit / B) steps (S. McCandlish et al., 2018, arXiv 1812.06162, eq. (2.11)).

    Attributes:
        minimum: S_min, in steps.
        critical: B_crit, in samples.
        misfit: the root mean square of the logarithms of the steps that were fitted over S(B).
    """

    minimum: float
    critical: float
    misfit: float

    def steps(self, batch_size: ArrayLike) -> NDArray[np.float64]:
        return self.minimum * (1 + self.critical / np.asarray(batch_size, dtype=float))


def fitted(batch_sizes: Sequence[int], steps: Sequence[float]) -> Hyperbola:
    """The fit to log S by least squares. For a given B_crit the best log S_min is a mean, which leaves one unknown."""
    sizes, logarithms = np.asarray(batch_sizes, dtype=float), np.log(steps)

    def residuals(log_critical: float) -> NDArray[np.float64]:
        return logarithms - np.log1p(np.exp(log_critical) / sizes)

    found = minimize_scalar(lambda each: residuals(each).var(), bounds=(0, np.log(LARGEST)), method="bounded")
    left = residuals(found.x)
    return Hyperbola(float(np.exp(left.mean())), float(np.exp(found.x)), float(left.std()))
