"""The diffusion metric: statistics of per-sample gradients -> epsilon -> weights on the samples."""

from .policies import POLICIES, SCALE_FREE_POLICIES, Epsilon, Fixed, Policy, Rayleigh, Spectral, Trace
from .solver import Solver, direction
from .stats import Statistics, Stats, rounding, statistics
from .weights import INVERSES, Inverse

__all__ = [
    "INVERSES",
    "POLICIES",
    "SCALE_FREE_POLICIES",
    "Epsilon",
    "Fixed",
    "Inverse",
    "Policy",
    "Rayleigh",
    "Solver",
    "Spectral",
    "Statistics",
    "Stats",
    "Trace",
    "direction",
    "rounding",
    "statistics",
]
