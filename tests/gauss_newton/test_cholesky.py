"""Factorisations, and what happens without a look at their outcome, as on a GPU."""

import pytest
import torch
from fitting import flat, levenberg_marquardt, network, points
from oracle import assert_close

import rgd_ext
from rgd_ext.gauss_newton.cholesky import Factorised, Singular

DOUBLE = torch.float64


def matrix(rank, size=6):
    factor = torch.randn(size, rank, dtype=DOUBLE)
    return factor @ factor.T


@pytest.mark.parametrize("waits", [True, False])
def test_a_definite_matrix_is_solved(waits):
    a, b = matrix(9), torch.randn(6, dtype=DOUBLE)
    found = Factorised(a, waits)
    assert_close(found.solve(b), torch.linalg.solve(a, b))
    assert found.jitter <= 1e-13


def test_a_singular_matrix_is_solved_where_there_is_a_solution():
    a = matrix(3)
    found = Factorised(a, waits=True)
    b = a @ torch.randn(6, dtype=DOUBLE)
    assert (a @ found.solve(b) - b).norm() < 1e-6 * b.norm()
    assert found.jitter > 0
    with pytest.raises(Singular, match="singular"):
        found.solve(torch.randn(6, dtype=DOUBLE))


def test_an_indefinite_matrix_is_refused():
    a = torch.diag(torch.tensor([1.0, -1.0], dtype=DOUBLE))
    with pytest.raises(Singular, match=r"2 equations.*at least 1e-08"):
        Factorised(a, waits=True)
    assert Factorised(a, waits=False).solve(torch.ones(2, dtype=DOUBLE)).isnan().all()


@pytest.fixture
def without_waiting(monkeypatch):
    """Steps take the road that they take on a GPU."""
    monkeypatch.setattr("rgd_ext.gauss_newton.evaluation._waits", lambda *_: False)


@pytest.mark.usefixtures("without_waiting")
def test_without_waiting_the_step_is_the_same():
    net, x = network(), points(6)
    expected = levenberg_marquardt(lambda: net(x), [*net.parameters()], 1e-2)
    optimizer = rgd_ext.GaussNewton(net, damping=1e-2, adaptive=False)
    optimizer.step(lambda: net(x))
    assert_close(flat(net.parameters()), expected)


@pytest.mark.usefixtures("without_waiting")
def test_without_waiting_a_step_that_is_not_finite_is_left_out():
    net, x = network(), points(6)
    optimizer = rgd_ext.GaussNewton(net, damping=1e-2, adaptive=False, momentum=0.9)
    optimizer.step(lambda: net(x))
    before, kept = flat(net.parameters()), [optimizer.state[p]["previous_step"].clone() for p in net.parameters()]
    optimizer.step(lambda: (net(x) - 10).log())
    assert torch.equal(flat(net.parameters()), before)
    assert all(torch.equal(optimizer.state[p]["previous_step"], k) for p, k in zip(net.parameters(), kept, strict=True))
