"""Least squares by Gauss-Newton steps that are combinations of the gradients of the residuals."""

from .optimizer import GaussNewton
from .report import Report

__all__ = ["GaussNewton", "Report"]
