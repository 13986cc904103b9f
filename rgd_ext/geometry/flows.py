"""Curves: the geodesic (4) and (8), the flow of RGD (10), the gradient flow, and sample paths of SGD (1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from ..metric import Epsilon
from .point import Losses, Point, checked_vector, covariance, local_metric, shown


def geodesic(
    losses: Losses,
    x0: Tensor,
    v0: Tensor,
    times: Tensor | Sequence[float],
    epsilon: Epsilon,
    weak_field: bool = True,
    **options: Any,
) -> Tensor:
    """The paper's geodesic under the force of the gradient: d^2x^k/dt^2 + Gamma^k_ij dx^i/dt dx^j/dt = -d/dt d_k f.

    Eq. (4) with the exact Christoffel symbols (5), or eq. (8) with those of the weak field. The right side of (8) is
    printed without the minus sign, which is in the derivation and in the integral of (8) that follows; it is kept here.
    As in the paper, the index of the force is not raised with the metric, so unlike a geodesic the curve depends on the
    coordinates. Without D, `v0 = -grad f(x0)` makes it the gradient flow.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x0, v0: position and velocity at times[0], shape (d,).
        times: shape (T,), increasing, T >= 2.
        epsilon: a number or a policy, evaluated at every point of the curve, but held constant in the symbols (see
            `christoffel`).
        weak_field: eq. (8), which requires |epsilon| < 1 / lambda_max(D) all along, or eq. (4).
        options: for scipy.integrate.solve_ivp; the defaults are method="DOP853", rtol=1e-9, atol=1e-12.

    Returns:
        Positions, shape (T, d), float64.

    Raises:
        ValueError: if `v0` or `times` is of another shape, or `times` does not increase.
        RuntimeError: if the integration fails.
    """
    x0 = checked_vector("x0", x0)
    v0 = checked_vector("v0", v0, len(x0))
    mean_gradient = grad(lambda x: losses(x).mean())

    def rate(state: Tensor) -> Tensor:
        x, v = state.chunk(2)
        local = local_metric(losses, x, epsilon, weak_field)
        second = jvp(lambda y: jvp(losses, (y,), (v,))[1], (x,), (v,))[1]  # v^T (Hessian of f_i) v, (N,)
        curvature = local.epsilon * covariance(second, local.point.gradients)
        if not weak_field:
            curvature = local.inverse(curvature)
        force = jvp(mean_gradient, (x,), (v,))[1]
        return torch.cat([v, -curvature - force])

    return _integrate(rate, torch.cat([x0, v0]), times, options)[:, : len(x0)]


def rgd_flow(
    losses: Losses,
    x0: Tensor,
    times: Tensor | Sequence[float],
    epsilon: Epsilon,
    weak_field: bool = True,
    **options: Any,
) -> Tensor:
    """Relativistic gradient descent in continuous time, dx/dt = -(I - eps D) grad f, eq. (10).

    Or, before the paper's last approximation, dx/dt = -(I + eps D)^-1 grad f.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x0: position at times[0], shape (d,).
        times: shape (T,), increasing, T >= 2.
        epsilon: a number or a policy, evaluated at every point of the flow.
        weak_field: I - eps D, which requires |epsilon| < 1 / lambda_max(D) all along, or the exact inverse.
        options: for scipy.integrate.solve_ivp; the defaults are method="DOP853", rtol=1e-9, atol=1e-12.

    Returns:
        Positions, shape (T, d), float64.

    Raises:
        ValueError: if `times` is of another shape or does not increase.
        RuntimeError: if the integration fails.
    """

    def rate(x: Tensor) -> Tensor:
        local = local_metric(losses, x, epsilon, weak_field)
        return -local.inverse(local.point.gradients.mean(0))

    return _integrate(rate, checked_vector("x0", x0), times, options)


def gradient_flow(losses: Losses, x0: Tensor, times: Tensor | Sequence[float], **options: Any) -> Tensor:
    """Gradient descent in continuous time, dx/dt = -grad f: eq. (10) with D = 0.

    Args:
        losses, x0, times, options: as `rgd_flow`.

    Returns:
        Positions, shape (T, d), float64.

    Raises:
        ValueError, RuntimeError: as `rgd_flow`.
    """

    return _integrate(lambda x: -Point(losses, x).gradients.mean(0), checked_vector("x0", x0), times, options)


@torch.no_grad()
def sgd_paths(
    losses: Losses,
    x0: Tensor,
    steps: int,
    *,
    lr: float,
    batch_size: int,
    paths: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample paths of SGD, x_{j+1} = x_j - lr grad_B f(x_j), eq. (1); step j is at time j lr of the flows.

    Batches are drawn with replacement, so that D = |B| cov(grad_B f) as in eq. (2), for any batch size. Without
    replacement there is another factor (N - |B|) / (N - 1), which the paper does not mention.

    Args:
        losses: function of x that returns the per-sample losses, (N,) in float64.
        x0: the start of all paths, shape (d,).
        steps, lr, batch_size: of each path.
        paths: how many, independent of each other.
        generator: of the random batches, on the device of `x0`.

    Returns:
        Positions, shape (paths, steps + 1, d), float64.

    Raises:
        ValueError: if `steps`, `batch_size` or `paths` is below 1, or `lr` is not positive and finite.
    """
    point = Point(losses, x0)
    for name, value in (("steps", steps), ("batch_size", batch_size), ("paths", paths)):
        if value < 1:
            raise ValueError(f"{name} is {value}: pass at least 1")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr is {lr}: pass a positive finite number")
    gradients = vmap(grad(lambda x, batch: losses(x)[batch].mean()))
    positions = [point.x.expand(paths, -1)]
    for _ in range(steps):
        batches = torch.randint(point.samples, (paths, batch_size), generator=generator, device=point.x.device)
        positions.append(positions[-1] - lr * gradients(positions[-1], batches))
    return torch.stack(positions, 1)


@torch.no_grad()
def _integrate(
    rate: Callable[[Tensor], Tensor], start: Tensor, times: Tensor | Sequence[float], options: dict[str, Any]
) -> Tensor:
    """Solution of dy/dt = rate(y) at `times`, (T, n)."""
    from scipy.integrate import solve_ivp

    times = torch.as_tensor(times, dtype=torch.float64).cpu()
    if times.ndim != 1 or len(times) < 2 or not times.isfinite().all() or not (times.diff() > 0).all():
        raise ValueError(f"times is {shown(times)}: pass at least two finite times, each later than the one before")
    options = {"method": "DOP853", "rtol": 1e-9, "atol": 1e-12} | options
    solution = solve_ivp(
        lambda _, y: rate(torch.as_tensor(y, device=start.device)).cpu().numpy(),
        (times[0].item(), times[-1].item()),
        start.cpu().numpy(),
        t_eval=times.numpy(),
        **options,
    )
    if not solution.success:
        reached = f"{len(solution.t)} of {len(times)} times"
        raise RuntimeError(f"the integration failed after {reached}: {solution.message} Try method='LSODA' or 'Radau'")
    return torch.as_tensor(solution.y.T.copy(), device=start.device)
