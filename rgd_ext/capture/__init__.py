"""The capture: per-sample gradients of an ordinary model from an ordinary backward."""

from .batch import mark
from .preconditioner import Preconditioner, precondition
from .rules import register_rule, unit

__all__ = ["Preconditioner", "mark", "precondition", "register_rule", "unit"]
