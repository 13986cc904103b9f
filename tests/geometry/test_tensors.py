"""The diffusion matrix, the metric and its Christoffel symbols: eqs. (2), (3) and (5) to (7)."""

import itertools

import pytest
import torch
from geometry_cases import (
    close,
    difference,
    every_problem,
    float64,
    gradients,
    largest,
    problem,
    quadratics,
)
from oracle import assert_close, diffusion_matrix, relative_error

import rgd_ext
from rgd_ext import Fixed, Spectral, Trace, geometry


@every_problem
def test_both_forms_of_equation_3_are_the_covariance_of_the_gradients(shape):
    losses, x = problem(shape)
    expected = diffusion_matrix(gradients(losses, x))
    assert_close(geometry.diffusion_matrix(losses, x), expected)
    assert_close(geometry.diffusion_matrix_pairwise(losses, x), expected)
    close(geometry.diffusion_matrix(losses, x), diffusion_matrix(difference(losses, x)), 1e-8)
    assert torch.linalg.matrix_rank(expected) <= shape[0] - 1


def test_d_is_the_covariance_of_the_centres_of_quadratic_losses():
    losses, centres = quadratics()
    for x in torch.randn(3, 3, dtype=float64):
        assert_close(geometry.diffusion_matrix(losses, x), torch.cov(centres.T, correction=0))


def test_d_vanishes_exactly_where_all_gradients_agree():
    losses, x = problem((4, 3))
    assert not geometry.diffusion_matrix(lambda y: losses(y)[:1].expand(4) + torch.arange(4), x).any()
    assert geometry.diffusion_matrix(lambda y: losses(y)[[0, 0, 1]], x).any()


@every_problem
@pytest.mark.parametrize(
    "policy",
    [0.01, Fixed(-0.01), Spectral(0.5), Trace(-0.5), lambda s: 0.1 / s.trace],
    ids=["number", "Fixed", "Spectral", "Trace", "callable"],
)
def test_metric_and_both_inverses(shape, policy):
    losses, x = problem(shape)
    rows = gradients(losses, x)
    matrix, identity = diffusion_matrix(rows), torch.eye(shape[1], dtype=float64)
    epsilon = rgd_ext.direction(rows, epsilon=policy)[1].epsilon
    assert_close(geometry.metric(losses, x, policy), identity + epsilon * matrix)
    assert_close(geometry.inverse_metric(losses, x, policy), identity - epsilon * matrix)
    exact = geometry.inverse_metric(losses, x, policy, weak_field=False)
    assert_close(exact @ geometry.metric(losses, x, policy), identity)


def test_metric_is_positive_definite_beyond_the_bound_of_equation_6_but_the_weak_field_is_not():
    losses, x = problem((7, 3))
    epsilon = 5 / largest(losses, x)
    assert torch.linalg.eigvalsh(geometry.metric(losses, x, epsilon))[0] > 0
    assert torch.linalg.eigvalsh(torch.eye(3) - epsilon * geometry.diffusion_matrix(losses, x))[0] < 0
    for function in (geometry.inverse_metric, geometry.christoffel, geometry.christoffel_closed_form):
        with pytest.raises(ValueError, match=r"needs epsilon below it, eq. \(6\)"):
            function(losses, x, epsilon)
    assert geometry.inverse_metric(losses, x, Spectral(5.0), weak_field=False).isfinite().all()


@pytest.mark.parametrize("scaled", [-1.01, -0.99, 0.99, 1.01])
@every_problem
def test_bounds_on_epsilon(shape, scaled):
    losses, x = problem(shape)
    epsilon = scaled / largest(losses, x)
    for weak_field, allowed in ((True, abs(scaled) < 1), (False, scaled > -1)):
        if allowed:
            inverse = geometry.inverse_metric(losses, x, epsilon, weak_field)
            assert torch.linalg.eigvalsh(inverse)[0] > 0
        else:
            with pytest.raises(ValueError, match=r"epsilon is .* 1 / lambda_max"):
                geometry.inverse_metric(losses, x, epsilon, weak_field)


def levi_civita(losses, x, epsilon, weak_field):
    """Eqs. (5) and (7) by loops and finite differences of the metric, with `epsilon` a function of x."""
    d = len(x)

    def metric(y):
        return torch.eye(d, dtype=float64) + epsilon(y) * diffusion_matrix(gradients(losses, y))

    derivative, inverse = difference(metric, x), torch.linalg.inv(metric(x))
    symbols = torch.zeros(d, d, d, dtype=float64)
    for k, i, j, z in itertools.product(range(d), repeat=4):
        raised = float(k == z) if weak_field else inverse[k, z]
        symbols[k, i, j] += raised * (derivative[j, z, i] + derivative[i, z, j] - derivative[i, j, z]) / 2
    return symbols


@every_problem
@pytest.mark.parametrize("weak_field", [True, False])
def test_christoffel_symbols_match_finite_differences_of_the_metric(shape, weak_field):
    losses, x = problem(shape)
    epsilon = 0.5 / largest(losses, x)
    symbols = geometry.christoffel(losses, x, epsilon, weak_field)
    close(symbols, levi_civita(losses, x, lambda y: epsilon, weak_field), 1e-7)
    assert torch.allclose(symbols, symbols.mT)


@every_problem
def test_closed_form_in_the_differences_of_losses_is_equation_7(shape):
    losses, x = problem(shape)
    epsilon = 0.5 / largest(losses, x)
    i, j = torch.triu_indices(shape[0], shape[0], 1)
    first = difference(lambda y: losses(y)[i] - losses(y)[j], x, 1e-4)
    second = difference(lambda y: gradients(losses, y)[i] - gradients(losses, y)[j], x)
    literal = epsilon / shape[0] ** 2 * torch.einsum("aij,ak->kij", second, first)
    close(geometry.christoffel_closed_form(losses, x, epsilon), literal, 1e-6)
    assert_close(geometry.christoffel_closed_form(losses, x, epsilon), geometry.christoffel(losses, x, epsilon))


def test_weak_field_symbols_are_wrong_by_second_order():
    losses, x = problem((7, 3))
    epsilon = 1e-3 / largest(losses, x)

    def error(e):
        return (geometry.christoffel(losses, x, e) - geometry.christoffel(losses, x, e, weak_field=False)).norm()

    assert error(2 * epsilon) / error(epsilon) == pytest.approx(4, rel=1e-2)


def test_symbols_take_epsilon_for_a_constant_and_a_policy_that_varies_has_others():
    losses, x = problem((7, 3))
    policy = Trace(0.5)
    symbols = geometry.christoffel(losses, x, policy)
    here = 0.5 / diffusion_matrix(gradients(losses, x)).trace()
    assert_close(symbols, geometry.christoffel(losses, x, here.item()))

    def epsilon(y):
        return 0.5 / diffusion_matrix(gradients(losses, y)).trace()

    full, slope = levi_civita(losses, x, epsilon, weak_field=True), difference(epsilon, x)
    matrix = diffusion_matrix(gradients(losses, x))
    missing = torch.einsum("i,jk->kij", slope, matrix) + torch.einsum("j,ik->kij", slope, matrix)
    missing = (missing - torch.einsum("k,ij->kij", slope, matrix)) / 2
    close(symbols + missing, full, 1e-8)
    assert relative_error(symbols, full) > 0.1
