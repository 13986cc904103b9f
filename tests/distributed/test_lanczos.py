"""The Lanczos iteration finds the largest eigenvalue, whatever the spectrum, in few products."""

import pytest
import torch

from rgd_ext.distributed.lanczos import largest_eigenvalue

B, DIM = 200, 300


def smallest_in_start(size):
    """The place of the smallest element of the vector that the iteration starts with."""
    start = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (start - start.mean()).abs().argmin()


def spectrum(values):
    """Gradients whose covariance has these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    centred = torch.randn(B, len(values), dtype=torch.float64)
    left = torch.linalg.qr(centred - centred.mean(0))[0]
    right = torch.linalg.qr(torch.randn(DIM, len(values), dtype=torch.float64))[0]
    return left * (B * values).sqrt() @ right.T


def outlier(factor):
    """Signs, and one sample whose gradient is orthogonal to them; the iteration starts with hardly any part of it."""
    grads = torch.zeros(B, DIM, dtype=torch.float64)
    grads[:, 0] = torch.where(torch.rand(B) < 0.5, -1.0, 1.0)
    grads[smallest_in_start(B), 1] = (factor * B) ** 0.5
    return grads


CASES = {
    "normal": lambda: torch.randn(B, DIM, dtype=torch.float64),
    "cluster": lambda: spectrum([1.0, 0.9999, 0.9998, *[0.5] * 20]),
    "equal": lambda: spectrum([1.0] * 30),
    "rank one": lambda: spectrum([1.0]),
    "decaying": lambda: spectrum(1 / torch.arange(1.0, 100.0) ** 2),
    "outlier": lambda: outlier(30.0),
    "outlier, little above": lambda: outlier(1.5),
    "two samples": lambda: torch.randn(2, DIM, dtype=torch.float64),
    "large mean": lambda: torch.randn(B, DIM, dtype=torch.float64) + 3 * torch.randn(DIM, dtype=torch.float64),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("name", CASES)
def test_the_largest_eigenvalue(name, dtype, tolerance):
    exact = CASES[name]()
    grads, numbers = exact.to(dtype), []

    def product(weights):
        numbers.append(weights)
        found = (grads @ (weights.to(dtype) @ grads)).double()
        return found - found.mean()

    noise = 0.1 * torch.finfo(dtype).eps * exact.square().sum(1).mean().item()
    found = largest_eigenvalue(product, len(grads), dtype, noise)
    expected = torch.linalg.svdvals(exact - exact.mean(0))[0] ** 2 / len(grads)
    assert found.dtype == dtype
    assert abs(found.double() / expected - 1) < tolerance
    assert len(numbers) <= 60


def test_one_sample_and_numbers_that_are_not_finite():
    assert largest_eigenvalue(torch.clone, 1, torch.float64) == 0
    assert largest_eigenvalue(lambda weights: weights * torch.nan, 5, torch.float32).isnan()
    assert largest_eigenvalue(torch.zeros_like, 5, torch.float32) == 0
