"""The data of the study: published data sets and digits, their splits, wrong labels, and tasks made of them."""

from .sources import DIGITS, Samples, Sources, Split

__all__ = ["DIGITS", "Samples", "Sources", "Split"]
