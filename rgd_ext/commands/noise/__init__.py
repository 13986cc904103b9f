"""`python -m rgd_ext noise`: the gradient noise scale of each parameter and module of a user's model."""

from .command import add

__all__ = ["add"]
