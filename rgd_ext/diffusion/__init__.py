"""The diffusion matrix D of a batch or a data set: products with vectors, its spectrum and its rank.

`matrix` holds the public class. It reads per-sample gradients from a source (`sources`, `stream`), forms sums over them
(`moments`, `products`), and computes eigenvalues (`spectrum`).
"""

from .matrix import DiffusionMatrix
from .spectrum import Estimate

__all__ = ["DiffusionMatrix", "Estimate"]
