"""`python -m rgd_ext spectrum`: the largest eigenvalues of D for a model and data that functions of the user return."""

from .command import add

__all__ = ["add"]
