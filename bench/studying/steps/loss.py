"""By how much a single step along a direction can lower the loss."""

from __future__ import annotations

import copy
from statistics import fmean

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..data import Samples
from ..scores import outputs_of

TOLERANCE = 0.05  # of the rate, at which a parabola falls by 1 - TOLERANCE^2 of its depth


class Loss:
    """The mean loss f of samples near the weights x of a model, which is left as it is.

    Attributes:
        here: f(x).
    """

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        self._scratch, self._samples = copy.deepcopy(model), samples
        self._x = parameters_to_vector(model.parameters()).detach().clone()
        self.here = self._at(self._x)

    def best_step(self, directions: Tensor, start: float) -> tuple[float, float]:
        """The rate t with the least mean over k of f(x - t p_k), and by how much that mean is less than f(x).

        It is the minimum that Brent's method finds.

        Args:
            directions: p, (k, d), in the order of `model.parameters()`.
            start: a rate of the right order.
        """

        def after(rate: float) -> float:
            return fmean(self._at(self._x - rate * each) for each in directions) if rate else self.here

        found = minimize_scalar(after, bracket=(0.0, start), tol=TOLERANCE)
        return float(found.x), self.here - float(found.fun)

    @torch.no_grad()
    def _at(self, weights: Tensor) -> float:
        vector_to_parameters(weights, self._scratch.parameters())
        return cross_entropy(outputs_of(self._scratch, self._samples).double(), self._samples.labels).item()
