"""Per-sample losses on which the equations of the paper are tested, and derivatives of them by other means."""

import pytest
import torch
from oracle import diffusion_matrix

float64 = torch.float64


def quadratics(samples=5, d=3, hessian=None):
    """f_i = (x - c_i)^T A (x - c_i) / 2, with A = 1: D is constant, A cov(c) A. Returns losses and centres."""
    centres = torch.randn(samples, d, dtype=float64)
    hessian = torch.eye(d, dtype=float64) if hessian is None else hessian
    return lambda x: ((x - centres) @ hessian * (x - centres)).sum(1) / 2, centres


def smooth(samples, d):
    """Losses with derivatives of all orders that differ between samples."""
    weights, targets = torch.randn(samples, d, dtype=float64), torch.randn(samples, dtype=float64)
    return lambda x: (torch.tanh(weights @ x) - targets).square() / 2 + (weights * x.sin()).sum(1) / 4


def curvatures(*values):
    """f_i = a_i x^2 / 2 in one dimension: no third derivatives, but Hessians that differ."""
    a = torch.tensor(values, dtype=float64)
    return lambda x: a * x[0] ** 2 / 2


PROBLEMS = {"more samples": (7, 3), "more weights": (3, 5), "two samples": (2, 2), "one weight": (4, 1)}
every_problem = pytest.mark.parametrize("shape", PROBLEMS.values(), ids=PROBLEMS)


def problem(shape):
    return smooth(*shape), torch.randn(shape[1], dtype=float64)


def gradients(losses, x):
    x = x.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0] for value in losses(x)])


def difference(function, x, step=1e-5):
    """Central differences, the derivative last."""
    shifts = step * torch.eye(len(x), dtype=float64)
    return torch.stack([(function(x + e) - function(x - e)) / (2 * step) for e in shifts], -1)


def close(value, expected, tolerance):
    error = (value - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < tolerance, f"error {error:.2e}"


def largest(losses, x):
    return torch.linalg.eigvalsh(diffusion_matrix(gradients(losses, x)))[-1].item()
