"""The methods of the study, by names that determine them."""

from .catalogue import METHODS
from .method import Method, Step

__all__ = ["METHODS", "Method", "Step"]
