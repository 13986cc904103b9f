"""What the figures of the study have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Of Okabe and Ito, for all kinds of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def band(axes: Any, x: Sequence[float], values: np.ndarray, colour: str, label: str, style: str = "-") -> None:
    """The mean over seeds of curves (seeds, points), and the band from the smallest to the largest."""
    axes.fill_between(x, values.min(0), values.max(0), facecolor=colour, alpha=0.15, linewidth=0)
    axes.plot(x, values.mean(0), color=colour, linestyle=style, label=label)
    axes.grid(alpha=0.3)
