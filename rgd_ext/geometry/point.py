"""Per-sample losses at a point: their derivatives, and the metric there.

For per-sample quantities a_i and b_i and their differences over the pairs of samples, a^ = (a_1 - a_2, a_1 - a_3, ...),
N^-2 <a^, b^> = mean_i (a_i - a)(b_i - b). So the paper's inner products are computed as covariances over the samples,
and its vector f^ of N (N - 1) / 2 differences is not formed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp

from .. import ops
from ..gradients import DenseGradients
from ..metric import Epsilon, statistics
from ..metric.inverses import weak_field_weights
from ..metric.policies import checked_policy, chosen_epsilon

Losses: TypeAlias = Callable[[Tensor], Tensor]

_LIMIT = 4 << 30  # bytes of one dense object


@cache
def _load_forward_mode() -> None:
    # The first use of forward-mode differentiation makes torch script a function, which warns of a deprecation.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", Warning)  # of whatever category the release of torch chose
        jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


def covariance(a: Tensor, b: Tensor) -> Tensor:
    """mean_i (a_i - a) (b_i - b) of all pairs of entries: (N, *m) and (N, *n) give (*m, *n)."""
    return torch.tensordot(a - a.mean(0), b - b.mean(0), dims=([0], [0])) / len(a)


def checked_vector(name: str, vector: Tensor, dimension: int | None = None) -> Tensor:
    """`vector` in float64, if it is a finite floating-point tensor (d,), with d = `dimension` where given."""
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        kind = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
        raise TypeError(f"{name} is a {kind}: pass a floating-point tensor of shape (d,)")
    if vector.ndim != 1 or not len(vector):
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}: pass a vector (d,); torch.nn.utils.parameters_to_vector makes"
            " one of a model's parameters"
        )
    if dimension not in (None, len(vector)):
        raise ValueError(f"{name} has {len(vector)} entries where x has {dimension}: pass a vector of the shape of x")
    if not vector.isfinite().all():
        raise ValueError(f"{name} is not finite: {shown(vector)}")
    return vector.detach().double()


class Point:
    """A point x in parameter space, with the N per-sample losses there and their derivatives.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x: shape (d,).

    Raises:
        TypeError: if `losses` is no function, or `x` or `losses(x)` not of the dtype asked for.
        ValueError: if `x` is not a finite vector, or `losses(x)` not (N,) with N >= 1.
    """

    def __init__(self, losses: Losses, x: Tensor) -> None:
        _load_forward_mode()
        if not callable(losses):
            raise TypeError(f"losses is a {type(losses).__name__}: pass a function of x (d,) that returns (N,)")
        self.losses, self.x = losses, checked_vector("x", x)
        with torch.no_grad():
            self.values = losses(self.x)
        if not isinstance(self.values, Tensor):
            raise TypeError(f"losses(x) is a {type(self.values).__name__}: return a tensor of shape (N,)")
        if self.values.ndim != 1 or not len(self.values):
            raise ValueError(
                f"losses(x) has shape {tuple(self.values.shape)}, so it is not per-sample: return one loss per sample,"
                " (N,), without a mean or sum over the samples (reduction='none')"
            )
        if self.values.dtype != torch.float64:
            raise TypeError(
                f"losses(x) is {self.values.dtype} for a float64 x: convert the model and the data with .double()"
            )

    @property
    def samples(self) -> int:
        """N, the number of samples."""
        return len(self.values)

    @property
    def dimension(self) -> int:
        """d, the number of parameters."""
        return len(self.x)

    def require(self, name: str, *shape: int, instead: str) -> None:
        """Raise ValueError if a tensor of `shape`, which the message calls `name`, would be too large."""
        size = 8 * math.prod(shape)
        if size > _LIMIT:
            raise ValueError(
                f"{name} of shape {shape} would take {size:,} bytes in float64, more than {_LIMIT >> 30} GiB: {instead}"
            )

    def per_sample_gradients(self, x: Tensor) -> Tensor:
        """The gradients g_i at any x, (N, d), as a differentiable function of it."""
        return (jacfwd if self.dimension <= self.samples else jacrev)(self.losses)(x)

    @cached_property
    def gradients(self) -> Tensor:
        """The gradients g_i at the point, (N, d)."""
        gradients = self.per_sample_gradients(self.x)
        if not gradients.isfinite().all():
            raise ValueError(f"the gradients of losses are not finite at x = {shown(self.x)}")
        return gradients

    def derivatives(self, order: int) -> Tensor:
        """All derivatives of `order` of each f_i, (N, d, ..., d)."""
        self.require(
            f"derivatives of order {order}",
            self.samples,
            *[self.dimension] * order,
            instead="take fewer samples, or a model of smaller d",
        )
        function = self.per_sample_gradients
        for _ in range(order - 1):
            function = jacfwd(function)
        return function(self.x)

    def identity(self) -> Tensor:
        """I, (d, d)."""
        return torch.eye(self.dimension, dtype=self.x.dtype, device=self.x.device)

    def diffusion_matrix(self) -> Tensor:
        """D, (d, d)."""
        self.require(
            "D", self.dimension, self.dimension, instead="rgd_ext.DiffusionMatrix multiplies by D without forming it"
        )
        return covariance(self.gradients, self.gradients)

    def diffusion_matrix_derivative(self) -> Tensor:
        """d D_rs / d x_u as [r, s, u]."""
        d, instead = self.dimension, "geodesic needs no dense derivative of the metric; or take a model of smaller d"
        self.require("the derivative of D", max(d, self.samples), d, d, instead=instead)

        def matrix(x: Tensor) -> Tensor:
            gradients = self.per_sample_gradients(x)
            return covariance(gradients, gradients)

        return jacfwd(matrix)(self.x)


@dataclass(frozen=True)
class LocalMetric:
    """The metric I + eps D at a point, and its inverse.

    Attributes:
        point: where it is.
        epsilon: a scalar.
        weak_field: whether the inverse is I - eps D instead of the exact one.
    """

    point: Point
    epsilon: Tensor
    weak_field: bool

    def perturbation(self, vector: Tensor) -> Tensor:
        """eps D v, (d,), without forming D."""
        gradients = self.point.gradients
        return self.epsilon * covariance(gradients @ vector, gradients)

    def matrix(self) -> Tensor:
        """I + eps D, (d, d)."""
        return self.epsilon * self.point.diffusion_matrix() + self.point.identity()

    def inverse(self, vector: Tensor) -> Tensor:
        """(I - eps D) v in the weak field, else (I + eps D)^-1 v; (d,)."""
        if self.weak_field:
            return vector - self.perturbation(vector)
        return torch.linalg.solve(self.matrix(), vector)


def local_metric(losses: Losses, x: Tensor, epsilon: Epsilon, weak_field: bool) -> LocalMetric:
    """The metric at x, with the epsilon that the policy chooses there, checked against eq. (6)."""
    policy = checked_policy(epsilon, "weak-field" if weak_field else "exact")
    point = Point(losses, x)
    gradients = DenseGradients(point.gradients)
    found = statistics(gradients, policy.needs == "gram")
    with found.aligning(gradients.align_with):
        chosen, _ = weak_field_weights(found, chosen_epsilon(policy, found))  # 0 where D = 0 to rounding
    check_epsilon(point, chosen, weak_field)
    return LocalMetric(point, chosen, weak_field)


def check_epsilon(point: Point, epsilon: Tensor, weak_field: bool) -> None:
    """Raise ValueError if `epsilon`, a tensor of any shape, has values outside of the bounds at the point, eq. (6)."""
    if not epsilon.isfinite().all():
        raise ValueError(f"epsilon is {shown(epsilon)}: pass a finite number, or a policy that returns one")
    centred = point.gradients - point.gradients.mean(0)
    gram = centred @ centred.T if point.samples < point.dimension else centred.T @ centred
    largest = ops.largest_eigenvalue(gram) / point.samples
    bound = f"1 / lambda_max(D) = {(1 / largest).item():.4g} at x = {shown(point.x)}"
    if weak_field and (epsilon * largest >= 1).any():
        raise ValueError(
            f"epsilon is {shown(epsilon)} and {bound}: I - eps D needs epsilon below it, eq. (6). Choose a smaller"
            " one, a policy that stays below it such as rgd_ext.Spectral(0.5), or the exact inverse (weak_field=False)"
            " where the function offers it"
        )
    if (epsilon * largest <= -1).any():
        raise ValueError(
            f"epsilon is {shown(epsilon)} and {bound}: I + eps D is a metric only for epsilon above its negative;"
            " choose a larger one"
        )


def shown(values: Tensor) -> str:
    """A scalar or the first few entries of a tensor, for messages."""
    first = ", ".join(f"{value:.4g}" for value in values.reshape(-1)[:4].tolist())
    return first if values.ndim == 0 else f"({first}{', ...' if values.numel() > 4 else ''})"
