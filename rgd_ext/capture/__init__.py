"""The capture: per-sample gradients of an ordinary model from an ordinary backward."""

from .batch import mark
from .findings import Verification
from .preconditioner import Preconditioner, handle_of, precondition
from .rules import register_rule, unit
from .verify import verify

__all__ = ["Preconditioner", "Verification", "handle_of", "mark", "precondition", "register_rule", "unit", "verify"]
