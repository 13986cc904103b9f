"""The capture: per-sample gradients of an ordinary model from an ordinary backward."""

from .batch import mark
from .findings import Verification
from .preconditioner import Preconditioner, precondition
from .rules import register_rule, unit
from .verify import verify

__all__ = ["Preconditioner", "Verification", "mark", "precondition", "register_rule", "unit", "verify"]
