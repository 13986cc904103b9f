"""Relativistic gradient descent for PyTorch: exact per-sample gradient geometry from an ordinary backward."""

from importlib.metadata import version

from . import geometry, ops
from ._binary import build_info
from .batch_norm import convert_batch_norm
from .capture import Preconditioner, Verification, handle_of, mark, precondition, register_rule, unit, verify
from .diffusion import DiffusionMatrix
from .gradients import PerSampleGradients
from .metric import Fixed, Rayleigh, Spectral, Stats, Trace, direction
from .monitor import Monitor
from .optim import RGD

__version__ = version("rgd_ext")
__all__ = [
    "RGD",
    "DiffusionMatrix",
    "Fixed",
    "Monitor",
    "PerSampleGradients",
    "Preconditioner",
    "Rayleigh",
    "Spectral",
    "Stats",
    "Trace",
    "Verification",
    "build_info",
    "convert_batch_norm",
    "direction",
    "geometry",
    "handle_of",
    "mark",
    "ops",
    "precondition",
    "register_rule",
    "unit",
    "verify",
]
