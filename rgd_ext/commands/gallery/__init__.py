"""`python -m rgd_ext gallery`: four pictures of what the diffusion metric does, each from a computation of its own."""

from .command import add

__all__ = ["add"]
