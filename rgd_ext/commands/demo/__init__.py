"""`python -m rgd_ext demo`: RGD beside SGD on real handwritten digits, with clean and with partly wrong labels."""

from .command import add

__all__ = ["add"]
