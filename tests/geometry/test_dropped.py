"""The terms that the paper drops between eqs. (8) and (10), and the error of the weak field."""

import pytest
import torch
from geometry_cases import close, curvatures, difference, float64, gradients, largest, problem, quadratics
from oracle import assert_close, diffusion_matrix

from rgd_ext import geometry


def test_weak_field_error_is_of_second_order_and_one_half_at_the_bound():
    losses, x = problem((7, 3))
    scaled = torch.tensor([-0.5, 0.0, 1e-3, 2e-3, 0.5, 1.0, 2.0], dtype=float64)
    errors = geometry.weak_field_error(losses, x, scaled / largest(losses, x))
    assert torch.allclose(errors, scaled**2 / (1 + scaled), atol=1e-13)
    assert errors[3] / errors[2] == pytest.approx(4, rel=2e-3)
    assert errors[5] == pytest.approx(0.5)


def test_the_terms_that_the_paper_drops_complete_its_identity_along_any_curve():
    losses, _ = problem((6, 3))
    c, v, a = 0.5 * torch.randn(3, 3, dtype=float64)
    epsilon, t = 0.01, torch.tensor([0.4], dtype=float64)

    def x(t):
        return c + v * t + a * torch.sin(t)

    def velocity(t):
        return v + a * torch.cos(t)

    def acceleration(t):
        return -a * torch.sin(t)

    def kept(t):
        return geometry.metric(losses, x(t), epsilon) @ velocity(t) - velocity(t)

    here, v_here, a_here = x(t), velocity(t), acceleration(t)
    symbols = torch.einsum("kij,i,j->k", geometry.christoffel(losses, here, epsilon), v_here, v_here)
    boundary = difference(lambda t: geometry.boundary_term(losses, x(t), velocity(t), epsilon), t)[:, 0]
    third = geometry.third_order_term(losses, here, v_here, a_here, epsilon)
    omitted = geometry.acceleration_term(losses, here, a_here, epsilon)
    sides = symbols / epsilon, (difference(kept, t)[:, 0] - boundary + third - omitted) / epsilon
    close(sides[1], sides[0], 1e-6)
    for term in (boundary, third, omitted):
        assert term.norm() > 0.05 * symbols.norm()


def test_dropped_terms_match_sums_over_pairs():
    losses, x = problem((6, 3))
    v, a = torch.randn(2, 3, dtype=float64)
    i, j = torch.triu_indices(6, 6, 1)
    epsilon = 0.01

    def pairs(values):
        return values[i] - values[j]

    def rates(t):  # d/dt of the gradients of f^ on x + v t + a t^2 / 2
        return pairs(gradients(losses, x + v * t + a * t**2 / 2))

    time, values, scale = torch.zeros(1, dtype=float64), pairs(losses(x)), epsilon / 36
    first = difference(rates, time)[..., 0]
    step = 1e-3
    second = (rates(step) - 2 * rates(0) + rates(-step)) / step**2
    close(geometry.boundary_term(losses, x, v, epsilon) / epsilon, scale / epsilon * values @ first, 1e-7)
    close(geometry.third_order_term(losses, x, v, a, epsilon) / epsilon, scale / epsilon * values @ second, 1e-4)
    close(
        geometry.acceleration_term(losses, x, a, epsilon) / epsilon, diffusion_matrix(gradients(losses, x)) @ a, 1e-10
    )


def test_boundary_term_does_not_shrink_with_the_number_of_samples():
    losses, x = problem((6, 3))
    v = torch.randn(3, dtype=float64)
    once = geometry.boundary_term(losses, x, v, 0.01)
    many = geometry.boundary_term(lambda y: losses(y).repeat(50), x, v, 0.01)
    assert_close(many, once)
    assert once.norm() > 0.1 * (geometry.metric(losses, x, 0.01) @ v - v).norm()


def test_vanishing_third_derivatives_do_not_give_equation_9():
    losses, x = curvatures(1, 3), torch.tensor([2.0], dtype=float64)
    one, zero = torch.ones(1, dtype=float64), torch.zeros(1, dtype=float64)
    assert geometry.derivative_spread(losses, x, 3) == 0
    assert geometry.third_order_term(losses, x, one, zero, 0.1) == 0
    # f = (2, 6), Hessians (1, 3): eps cov(f, H a) = 0.1 * 2.
    assert geometry.third_order_term(losses, x, one, one, 0.1).item() == pytest.approx(0.2)


def test_derivative_spread_is_the_norm_over_pairs():
    losses, x = problem((5, 3))
    i, j = torch.triu_indices(5, 5, 1)
    first = gradients(losses, x)
    second = difference(lambda y: gradients(losses, y), x)
    third = difference(lambda y: difference(lambda z: gradients(losses, z), y, 1e-4), x, 1e-4)
    for order, values in enumerate((first, second, third), 1):
        expected = (values[i] - values[j]).norm() / 5
        close(geometry.derivative_spread(losses, x, order), expected, 1e-6)
    assert_close(geometry.derivative_spread(losses, x, 1) ** 2, geometry.diffusion_matrix(losses, x).trace())


def test_equal_hessians_leave_nothing_dropped_but_the_acceleration():
    losses, _ = quadratics()
    x, v, a = torch.randn(3, 3, dtype=float64)
    assert geometry.derivative_spread(losses, x, 2) < 1e-12
    for value in (
        geometry.christoffel(losses, x, 0.1),
        geometry.boundary_term(losses, x, v, 0.1),
        geometry.third_order_term(losses, x, v, a, 0.1),
        geometry.metric_divergence(losses, x, 0.1),
    ):
        assert value.abs().max() < 1e-12
    assert geometry.acceleration_term(losses, x, a, 0.1).norm() > 1e-3
