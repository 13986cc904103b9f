"""The diffusion metric and other rules: statistics of per-sample gradients -> weights on the samples."""

from .arguments import NEEDS, Need
from .inverses import INVERSES, Inverse
from .per_parameter import PerParameter
from .policies import POLICIES, SCALE_FREE_POLICIES, Ascent, Epsilon, Fixed, Policy, Rayleigh, Spectral, Trace
from .rules import Observation, Rule, State, Weights
from .solver import Solver, checked_rule, direction
from .stats import ParameterVector, Statistics, Stats, on_host, rounding, statistics

__all__ = [
    "INVERSES",
    "NEEDS",
    "POLICIES",
    "SCALE_FREE_POLICIES",
    "Ascent",
    "Epsilon",
    "Fixed",
    "Inverse",
    "Need",
    "Observation",
    "ParameterVector",
    "PerParameter",
    "Policy",
    "Rayleigh",
    "Rule",
    "Solver",
    "Spectral",
    "State",
    "Statistics",
    "Stats",
    "Trace",
    "Weights",
    "checked_rule",
    "direction",
    "on_host",
    "rounding",
    "statistics",
]
