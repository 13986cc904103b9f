"""The capture: per-sample gradients of an ordinary model from an ordinary backward."""

from ..layers.registry import register_rule, unit
from .captures import handle_of, observe, precondition
from .findings import Verification
from .handle import Preconditioner
from .marks import mark
from .verify import verify

__all__ = [
    "Preconditioner",
    "Verification",
    "handle_of",
    "mark",
    "observe",
    "precondition",
    "register_rule",
    "unit",
    "verify",
]
