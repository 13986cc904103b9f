"""Relativistic gradient descent for PyTorch: exact per-sample gradient geometry from an ordinary backward."""

from importlib.metadata import version

from . import geometry, ops, weights
from ._binary import build_info
from .batch_norm import convert_batch_norm
from .capture import Preconditioner, Verification, handle_of, mark, observe, precondition, register_rule, unit, verify
from .diffusion import DiffusionMatrix
from .gauss_newton import GaussNewton
from .gradients import PerSampleGradients
from .metric import Ascent, Fixed, Rayleigh, Spectral, Statistics, Stats, Trace, direction
from .monitor import Monitor
from .optim import RGD

__version__ = version("rgd_ext")
__all__ = [
    "RGD",
    "Ascent",
    "DiffusionMatrix",
    "Fixed",
    "GaussNewton",
    "Monitor",
    "PerSampleGradients",
    "Preconditioner",
    "Rayleigh",
    "Spectral",
    "Statistics",
    "Stats",
    "Trace",
    "Verification",
    "build_info",
    "convert_batch_norm",
    "direction",
    "geometry",
    "handle_of",
    "mark",
    "observe",
    "ops",
    "precondition",
    "register_rule",
    "unit",
    "verify",
    "weights",
]
