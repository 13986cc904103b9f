"""The diffusion matrix, the metric and its Christoffel symbols: eqs. (2), (3) and (5) to (7)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..metric import Epsilon
from .point import Losses, Point, covariance, local_metric


def diffusion_matrix(losses: Losses, x: Tensor) -> Tensor:
    """D = mean_i (g_i - g)(g_i - g)^T, the covariance of the per-sample gradients, eq. (2).

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x: shape (d,).

    Returns:
        Shape (d, d) in float64; symmetric, positive semi-definite, of rank at most N - 1.

    Example:
        >>> centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
        >>> rgd_ext.geometry.diffusion_matrix(lambda x: (x - centres).square().sum(1) / 2, torch.zeros(2))
        tensor([[1., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    return Point(losses, x).diffusion_matrix()


def diffusion_matrix_pairwise(losses: Losses, x: Tensor) -> Tensor:
    """D_rs = N^-2 <d_r f^, d_s f^> over the differences f^ of all pairs of losses, eq. (3), as printed.

    Args:
        losses, x: as `diffusion_matrix`, which it equals.

    Returns:
        Shape (d, d) in float64.
    """
    point = Point(losses, x)
    pairs = point.samples * (point.samples - 1) // 2
    point.require("the gradient of f^", pairs, point.dimension, instead="call diffusion_matrix, which is equal")
    point.require("D", point.dimension, point.dimension, instead="rgd_ext.DiffusionMatrix does without D")
    first, second = torch.triu_indices(point.samples, point.samples, 1, device=point.x.device)
    differences = point.gradients[first] - point.gradients[second]
    return differences.T @ differences / point.samples**2


def metric(losses: Losses, x: Tensor, epsilon: Epsilon) -> Tensor:
    """The diffusion metric I + eps D, eq. (6).

    The paper asks for epsilon < 1 / lambda_max to keep it non-singular. A non-negative epsilon always does; a negative
    one must be above -1 / lambda_max, and that is what is checked here. The weak-field inverse needs the paper's bound.

    Args:
        losses, x: as `diffusion_matrix`.
        epsilon: a number or a policy, evaluated at x.

    Returns:
        Shape (d, d) in float64, positive definite.
    """
    return local_metric(losses, x, epsilon, weak_field=False).matrix()


def inverse_metric(losses: Losses, x: Tensor, epsilon: Epsilon, weak_field: bool = True) -> Tensor:
    """I - eps D, the weak-field inverse of the metric (6), or the exact (I + eps D)^-1.

    They differ by sum_{n >= 2} (-eps D)^n, of second order in epsilon: see `weak_field_error`.

    Args:
        losses, x: as `diffusion_matrix`.
        epsilon: a number or a policy, evaluated at x.
        weak_field: which of the two; I - eps D requires |epsilon| < 1 / lambda_max(D): eq. (6) as an upper bound.

    Returns:
        Shape (d, d) in float64, positive definite.
    """
    local = local_metric(losses, x, epsilon, weak_field)
    matrix = local.matrix()
    return 2 * local.point.identity() - matrix if weak_field else matrix.inverse()


def christoffel(losses: Losses, x: Tensor, epsilon: Epsilon, weak_field: bool = True) -> Tensor:
    """Christoffel symbols of the metric, from its derivatives: eq. (7) in the weak field, or eq. (5).

    Exact: Gamma^k_ij = 1/2 sum_z g^kz (d_i g_jz + d_j g_iz - d_z g_ij). The weak field drops O(eps^2), so that g^kz
    becomes the identity. Epsilon is a constant in the derivatives, as in the paper; if it varies, the symbols lack
    (d_i eps D_jk + d_j eps D_ik - d_k eps D_ij) / 2 (raised with g^kz for the exact ones), of first order in epsilon.

    Args:
        losses, x: as `diffusion_matrix`.
        epsilon: a number or a policy, evaluated at x.
        weak_field: eq. (7), which requires |epsilon| < 1 / lambda_max(D), or eq. (5).

    Returns:
        Shape (d, d, d) in float64 as [k, i, j], symmetric in i and j.
    """
    local = local_metric(losses, x, epsilon, weak_field)
    derivative = local.epsilon * local.point.diffusion_matrix_derivative()  # d_u g_rs as [r, s, u]
    lowered = (derivative + derivative.mT - derivative.permute(2, 0, 1)) / 2
    return lowered if weak_field else torch.linalg.solve(local.matrix(), lowered.flatten(1)).view_as(lowered)


def christoffel_closed_form(losses: Losses, x: Tensor, epsilon: Epsilon) -> Tensor:
    """Weak-field Christoffel symbols Gamma^k_ij = eps N^-2 <d_i d_j f^, d_k f^>, the unnumbered result below eq. (7).

    It equals `christoffel(..., weak_field=True)` for all smooth losses and constant epsilon: no approximation beyond
    that of eq. (7). The symbols vanish where all losses have the same Hessian, even though D need not.

    Args:
        losses, x: as `diffusion_matrix`.
        epsilon: a number or a policy, evaluated at x; |epsilon| < 1 / lambda_max(D).

    Returns:
        Shape (d, d, d) in float64 as [k, i, j].
    """
    local = local_metric(losses, x, epsilon, weak_field=True)
    d = local.point.dimension
    local.point.require("Gamma", d, d, d, instead="geodesic needs no dense symbols; or take a model of smaller d")
    return local.epsilon * covariance(local.point.gradients, local.point.derivatives(2))
