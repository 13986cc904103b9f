"""The potential and the probability current: eqs. (11) and (12)."""

import pytest
import torch
from geometry_cases import (
    close,
    curvatures,
    difference,
    every_problem,
    float64,
    gradients,
    largest,
    problem,
    quadratics,
    smooth,
)
from oracle import assert_close, diffusion_matrix

from rgd_ext import geometry


@every_problem
def test_equation_11_holds_exactly_and_to_first_order_in_the_weak_field(shape):
    losses, x = problem(shape)
    epsilon, gradient = 0.5 / largest(losses, x), gradients(losses, x).mean(0)
    matrix, metric = diffusion_matrix(gradients(losses, x)), geometry.metric(losses, x, epsilon)
    assert_close(metric @ geometry.potential_gradient(losses, x, epsilon), gradient)
    weak = metric @ geometry.potential_gradient(losses, x, epsilon, weak_field=True)
    assert_close(weak - gradient, -(epsilon**2) * matrix @ matrix @ gradient)


def test_there_is_a_potential_for_constant_d_that_commutes_with_the_hessian_and_in_general_none():
    skewed = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=float64))
    for (losses, _), symmetric in (
        (quadratics(), True),
        (quadratics(hessian=skewed), False),
        ((smooth(7, 3),) * 2, False),
    ):
        x = torch.randn(3, dtype=float64)
        epsilon = 0.5 / largest(losses, x)
        jacobian = difference(lambda y, f=losses, e=epsilon: geometry.potential_gradient(f, y, e), x)
        assert (((jacobian - jacobian.T).norm() / jacobian.norm()).item() < 1e-8) is symmetric


@every_problem
def test_divergence_matches_finite_differences_of_the_metric(shape):
    losses, x = problem(shape)
    epsilon = 0.5 / largest(losses, x)
    derivative = difference(lambda y: epsilon * diffusion_matrix(gradients(losses, y)), x)
    expected = torch.stack([row.diagonal().sum() for row in derivative])
    close(geometry.metric_divergence(losses, x, epsilon), expected, 1e-8)


def test_vanishing_third_derivatives_do_not_make_the_divergence_vanish():
    losses, x = curvatures(1, 3), torch.tensor([2.0], dtype=float64)  # D = var(a) x^2 = x^2
    assert geometry.metric_divergence(losses, x, 0.1).item() == pytest.approx(0.1 * 2 * 2)


def test_current_is_the_divergence_over_beta_and_vanishes_for_equal_hessians():
    losses, x = problem((7, 3))
    epsilon = 0.5 / largest(losses, x)
    assert_close(geometry.current(losses, x, epsilon, 4.0), -geometry.metric_divergence(losses, x, epsilon) / 4)
    rows = gradients(losses, x)
    matrix = epsilon * diffusion_matrix(rows)
    remainder = -matrix @ matrix @ rows.mean(0)
    weak = geometry.current(losses, x, epsilon, 4.0, weak_field=True)
    assert_close(weak - geometry.current(losses, x, epsilon, 4.0), remainder)
    equal, _ = quadratics()
    assert geometry.current(equal, x, 0.1, 0.01).abs().max() < 1e-10
