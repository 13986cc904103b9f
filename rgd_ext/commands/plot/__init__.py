"""`python -m rgd_ext plot`: a figure of a training that `Monitor` recorded."""

from .command import add

__all__ = ["add"]
