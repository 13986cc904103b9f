"""Differential equations with known solutions, as problems of least squares.

The derivatives with respect to the inputs are by torch.autograd.grad, which takes less time for all methods than
torch.func does.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import hessian, vmap

from .problems import Batch, Problem, Residual, uniform

DIFFUSIVITY = 0.1
FRESH = 1000  # points at which a solution is compared with the exact one


def root_mean_square(model: nn.Module, of: Residual, x: Tensor, wanted: Tensor) -> float:
    """The error of a solution, which is a function `of` the model and points."""
    with torch.no_grad():
        return (of(model, x) - wanted).square().mean().sqrt().item()


def sines(x: Tensor) -> Tensor:
    """sin(pi x) sin(pi y), (B,)."""
    return torch.sin(math.pi * x).prod(1)


def zero_on_boundary(model: nn.Module, x: Tensor) -> Tensor:
    """u = x (1 - x) y (1 - y) model(x, y), (B,), or a scalar for one point."""
    return (x * (1 - x)).prod(-1) * model(x)[..., 0]


def by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """laplace(u), (B,)."""
    x = x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(zero_on_boundary(model, x).sum(), x, create_graph=True)
    seconds = (torch.autograd.grad(slopes[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1]))
    return sum(seconds)


def by_transforms(model: nn.Module, x: Tensor) -> Tensor:
    """laplace(u), (B,), by torch.func."""
    return vmap(lambda point: hessian(partial(zero_on_boundary, model))(point).trace())(x)


def poisson() -> Problem:
    """laplace(u) = -f on the unit square, zero on its boundary; u = sin(pi x) sin(pi y)."""
    inner, fresh = uniform(256, 2), uniform(FRESH, 2)

    def residual(laplace: Residual, model: nn.Module, x: Tensor, f: Tensor) -> Tensor:
        return laplace(model, x) + f

    inputs = (inner, 2 * math.pi**2 * sines(inner))
    batch = Batch(partial(residual, by_autograd), inputs, partial(residual, by_transforms))
    solution_error = partial(root_mean_square, of=zero_on_boundary, x=fresh, wanted=sines(fresh))
    return Problem((2, 32, 32, 1), (batch,), solution_error)


def heat_solution(x: Tensor) -> Tensor:
    """exp(-c pi^2 t) sin(pi x) + exp(-9 c pi^2 t) sin(3 pi x) / 2, (B,), at points (x, t)."""
    modes = ((1, 1.0), (3, 0.5))
    place, time = math.pi * x[:, 0], DIFFUSIVITY * math.pi**2 * x[:, 1]
    return sum(size * torch.exp(-(n**2) * time) * torch.sin(n * place) for n, size in modes)


def value(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[:, 0]


def heat_residual(model: nn.Module, x: Tensor) -> Tensor:
    """u_t - c u_xx, (B,), at points (x, t)."""
    x = x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (seconds,) = torch.autograd.grad(slopes[:, 0].sum(), x, create_graph=True)
    return slopes[:, 1] - DIFFUSIVITY * seconds[:, 0]


def heat() -> Problem:
    """u_t = c u_xx for x and t from 0 to 1, with residuals inside, at t = 0, and at x = 0 and x = 1."""
    inner, start, sides, fresh = uniform(200, 2), uniform(50, 2), uniform(50, 2), uniform(FRESH, 2)
    start[:, 1] = 0
    sides[:, 0] = sides[:, 0].round()

    def difference(model: nn.Module, x: Tensor, wanted: Tensor) -> Tensor:
        return value(model, x) - wanted

    known = (Batch(difference, (x, heat_solution(x))) for x in (start, sides))
    solution_error = partial(root_mean_square, of=value, x=fresh, wanted=heat_solution(fresh))
    return Problem((2, 32, 32, 1), (Batch(heat_residual, (inner,)), *known), solution_error)
