"""The potential that SGD is said to minimise, and the probability current: eqs. (11) and (12)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..metric import Epsilon
from .point import LocalMetric, Losses, local_metric


def potential_gradient(losses: Losses, x: Tensor, epsilon: Epsilon, weak_field: bool = False) -> Tensor:
    """grad Phi of grad f = (I + eps D) grad Phi, eq. (11): the gradient of f in the diffusion metric.

    With `weak_field`, (I - eps D) grad f, minus the velocity of eq. (10): then eq. (11) holds to first order, with a
    remainder of -eps^2 D^2 grad f. The paper takes for granted that the field is the gradient of some Phi. That needs
    a symmetric Jacobian, as for d = 1, or for a constant D that commutes with the Hessian of f; in general there is no
    Phi.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x: shape (d,).
        epsilon: a number or a policy, evaluated at x.
        weak_field: I - eps D, which requires |epsilon| < 1 / lambda_max(D), instead of the exact inverse.

    Returns:
        Shape (d,), float64.
    """
    local = local_metric(losses, x, epsilon, weak_field)
    return local.inverse(local.point.gradients.mean(0))


def metric_divergence(losses: Losses, x: Tensor, epsilon: Epsilon) -> Tensor:
    """div D~, sum_s d_s D~_rs with D~ = I + eps D, of eq. (12).

    The paper says that it vanishes by eq. (9). Vanishing third derivatives are not enough: it is
    eps/N^2 sum_s (<d_r d_s f^, d_s f^> + <d_r f^, d_s d_s f^>), and vanishes where all losses have the same Hessian.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x: shape (d,).
        epsilon: a number or a policy, evaluated at x and constant in the derivative.

    Returns:
        Shape (d,), float64.
    """
    return _divergence(local_metric(losses, x, epsilon, weak_field=False))


def current(losses: Losses, x: Tensor, epsilon: Epsilon, beta: float, weak_field: bool = False) -> Tensor:
    """j = -grad f + D~ grad Phi - beta^-1 div D~ with D~ = I + eps D, eq. (12), and grad Phi of `potential_gradient`.

    The first two terms cancel by eq. (11), or leave -eps^2 D^2 grad f in the weak field. The paper concludes j = 0,
    for which div D~ must vanish too: see `metric_divergence`.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x: shape (d,).
        epsilon: a number or a policy, evaluated at x and constant in the derivative.
        beta: inverse temperature, positive.
        weak_field: of `potential_gradient`.

    Returns:
        Shape (d,), float64.

    Raises:
        ValueError: if `beta` is not positive and finite.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}: pass a positive finite number")
    local = local_metric(losses, x, epsilon, weak_field)
    gradient = local.point.gradients.mean(0)
    potential = local.inverse(gradient)
    return potential + local.perturbation(potential) - gradient - _divergence(local) / beta


def _divergence(local: LocalMetric) -> Tensor:
    return local.epsilon * torch.einsum("rss->r", local.point.diffusion_matrix_derivative())
