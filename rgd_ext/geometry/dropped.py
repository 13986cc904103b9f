"""The terms that the paper drops on the way from the geodesic (8) to RGD (10).

Along any curve x(t) with velocity v and acceleration a, and for constant epsilon, the Christoffel term of eq. (8) is

    eps/N^2 sum_ij <d_i d_j f^, d_k f^> v^i v^j
        = d/dt (eps D v)_k - d/dt boundary_term_k + third_order_term_k - acceleration_term_k.

The paper keeps the first term alone, which leads to eq. (10). The functions here compute the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import jvp

from ..metric import Epsilon
from .point import LocalMetric, Losses, Point, check_epsilon, checked_vector, covariance, local_metric


def weak_field_error(losses: Losses, x: Tensor, epsilons: Tensor | Sequence[float]) -> Tensor:
    """Largest singular value of (I + eps D)^-1 - (I - eps D), the error of the weak field behind eqs. (7) and (10).

    It is (eps lambda_max)^2 / (1 + eps lambda_max) for eps >= 0: of second order, and 1/2 at the bound of eq. (6).

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x: shape (d,).
        epsilons: numbers, shape (k,), above -1 / lambda_max(D); those beyond eq. (6) are allowed here.

    Returns:
        Shape (k,), float64.
    """
    point = Point(losses, x)
    epsilons = torch.as_tensor(epsilons, dtype=torch.float64, device=point.x.device)
    if epsilons.ndim != 1:
        raise ValueError(f"epsilons has shape {tuple(epsilons.shape)}: pass a vector of numbers (k,)")
    check_epsilon(point, epsilons, weak_field=False)
    matrix, identity = point.diffusion_matrix(), point.identity()
    errors = [(identity + e * matrix).inverse() - (identity - e * matrix) for e in epsilons]
    return torch.stack([torch.linalg.matrix_norm(error, 2) for error in errors])


def derivative_spread(losses: Losses, x: Tensor, order: int) -> Tensor:
    """N^-1 |d^order f^|: how much the losses' derivatives of an order differ between samples, eqs. (3) and (9).

    It is the square root of the variance over samples, summed over all entries of the derivative. Order 1 gives
    (tr D)^1/2. Order 2 is 0 where all Hessians agree, and then the symbols of eq. (7) and div D~ of eq. (12) vanish.
    Order 3 is 0 where d_i d_j d_k f^ = 0, which the paper gives as the reason for eq. (9), "in many practical
    applications". That holds for quadratic losses, and not for cross-entropy or networks of more than one layer.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x: shape (d,).
        order: at least 1.

    Returns:
        A scalar, float64; in units of loss / |x|^order.

    Raises:
        ValueError: if `order` is below 1, or the derivatives, (N, d, ..., d), are too large.
    """
    if order < 1:
        raise ValueError(f"order is {order}: pass at least 1")
    derivatives = Point(losses, x).derivatives(order)
    return (derivatives - derivatives.mean(0)).square().sum().div(len(derivatives)).sqrt()


def acceleration_term(losses: Losses, x: Tensor, acceleration: Tensor, epsilon: Epsilon) -> Tensor:
    """eps D a = eps/N^2 sum_alpha d_k f^_alpha sum_i d_i f^_alpha d^2x^i/dt^2, left out between eqs. (8) and (9).

    There the paper equates sum_ij d_i d_j f^ dx^i/dt dx^j/dt with d^2 f^/dt^2, which also has sum_i d_i f^ d^2x^i/dt^2.
    It is of the order of what is kept. Where all Hessians agree nothing else is dropped before the weak-field inverse:
    there eq. (8) with v0 = -grad f is the gradient flow whatever D is, and eq. (10) is not.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x, acceleration: shape (d,).
        epsilon: a number or a policy, evaluated at x; |epsilon| < 1 / lambda_max(D).

    Returns:
        Shape (d,), float64.
    """
    local, (acceleration,) = _along(losses, x, epsilon, acceleration=acceleration)
    return local.perturbation(acceleration)


def boundary_term(losses: Losses, x: Tensor, velocity: Tensor, epsilon: Epsilon) -> Tensor:
    """eps/N^2 sum_alpha f^_alpha d/dt d_k f^_alpha = eps cov_i(f_i, (H_i v)_k), dropped just before eq. (10).

    H_i is the Hessian of f_i. The paper drops it for the smallness of eps/N^2; but the sum has N (N - 1) / 2 terms, and
    like eps D v, which is kept, this does not shrink with N. It is 0 where all Hessians agree, or all losses do.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x, velocity: shape (d,).
        epsilon: a number or a policy, evaluated at x; |epsilon| < 1 / lambda_max(D).

    Returns:
        Shape (d,), float64; beside eps D v it has the units of dx/dt.
    """
    local, (velocity,) = _along(losses, x, epsilon, velocity=velocity)
    point = local.point
    rates = jvp(point.per_sample_gradients, (point.x,), (velocity,))[1]
    return local.epsilon * covariance(point.values, rates)


def third_order_term(losses: Losses, x: Tensor, velocity: Tensor, acceleration: Tensor, epsilon: Epsilon) -> Tensor:
    """eps/N^2 sum_alpha f^_alpha d^2/dt^2 d_k f^_alpha, set to 0 by eq. (9).

    The second derivative in time is sum_ij d_i d_j d_k f^ v^i v^j + sum_i d_i d_k f^ a^i. The paper's reason,
    d_i d_j d_k f^ = 0, disposes of the first sum alone; the second needs equal Hessians, or no acceleration.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x, velocity, acceleration: shape (d,).
        epsilon: a number or a policy, evaluated at x; |epsilon| < 1 / lambda_max(D).

    Returns:
        Shape (d,), float64; its integral over time is what eq. (10) lacks.
    """
    local, (velocity, acceleration) = _along(losses, x, epsilon, velocity=velocity, acceleration=acceleration)
    point = local.point

    def rate(y: Tensor) -> Tensor:
        return jvp(point.per_sample_gradients, (y,), (velocity,))[1]

    second = jvp(rate, (point.x,), (velocity,))[1]
    accelerated = jvp(point.per_sample_gradients, (point.x,), (acceleration,))[1]
    return local.epsilon * covariance(point.values, second + accelerated)


def _along(losses: Losses, x: Tensor, epsilon: Epsilon, **vectors: Tensor) -> tuple[LocalMetric, list[Tensor]]:
    """The metric at x, and `vectors` there as checked by `checked_vector`."""
    local = local_metric(losses, x, epsilon, weak_field=True)
    return local, [checked_vector(name, vector, local.point.dimension) for name, vector in vectors.items()]
