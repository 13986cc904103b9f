"""The equations of the paper: against finite differences, and on problems solvable by hand."""

import itertools
import math

import numpy
import pytest
import torch
from oracle import assert_close, diffusion_matrix, relative_error

import rgd_ext
from rgd_ext import Fixed, Rayleigh, Spectral, Trace, geometry

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


# Eqs. (2), (3) and (6)


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


def test_weak_field_error_is_of_second_order_and_one_half_at_the_bound():
    losses, x = problem((7, 3))
    scaled = torch.tensor([-0.5, 0.0, 1e-3, 2e-3, 0.5, 1.0, 2.0], dtype=float64)
    errors = geometry.weak_field_error(losses, x, scaled / largest(losses, x))
    assert torch.allclose(errors, scaled**2 / (1 + scaled), atol=1e-13)
    assert errors[3] / errors[2] == pytest.approx(4, rel=2e-3)
    assert errors[5] == pytest.approx(0.5)


# Eqs. (5) and (7)


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


# Eqs. (1), (4), (8) and (10)

TIMES = torch.linspace(0, 2, 9, dtype=float64)


@pytest.mark.parametrize("weak_field", [True, False])
@pytest.mark.parametrize("policy", [Fixed(0.2), Spectral(0.8), Trace(-0.5)], ids=str)
def test_rgd_flow_of_quadratic_losses_is_the_closed_form(policy, weak_field):
    losses, centres = quadratics()
    x0, mean = torch.randn(3, dtype=float64), centres.mean(0)
    matrix = torch.cov(centres.T, correction=0)
    epsilon = rgd_ext.direction(gradients(losses, x0), epsilon=policy)[1].epsilon
    identity = torch.eye(3, dtype=float64)
    rate = identity - epsilon * matrix if weak_field else torch.linalg.inv(identity + epsilon * matrix)
    expected = [mean + torch.linalg.matrix_exp(-rate * t) @ (x0 - mean) for t in TIMES]
    close(geometry.rgd_flow(losses, x0, TIMES, policy, weak_field), torch.stack(expected), 1e-8)


def test_gradient_flow_of_quadratic_losses_is_the_closed_form():
    losses, centres = quadratics()
    x0, mean = torch.randn(3, dtype=float64), centres.mean(0)
    expected = mean + torch.exp(-TIMES)[:, None] * (x0 - mean)
    close(geometry.gradient_flow(losses, x0, TIMES), expected, 1e-8)
    close(geometry.rgd_flow(losses, x0, TIMES, 0.0), expected, 1e-8)


def euler(losses, x, policy, step=1e-3, count=500):
    """Positions of RGD with small steps."""
    for _ in range(count):
        yield x
        x = x - step * rgd_ext.direction(gradients(losses, x), epsilon=policy)[0][0]


@pytest.mark.parametrize("policy", [Spectral(0.5), lambda s: 0.3 / s.trace], ids=["Spectral", "callable"])
def test_rgd_flow_asks_the_policy_anew_at_every_point(policy):
    losses, x = problem((7, 3))
    path = geometry.rgd_flow(losses, x, [0.0, 0.02, 0.04], policy)
    velocity = (path[2] - path[0]) / 0.04
    (step,), _ = rgd_ext.direction(gradients(losses, path[1]), epsilon=policy)
    close(velocity, -step, 1e-3)
    steps = [rgd_ext.direction(gradients(losses, y), epsilon=policy)[0][0] for y in euler(losses, x, policy)]
    close(x - 1e-3 * torch.stack(steps).sum(0), geometry.rgd_flow(losses, x, [0.0, 0.5], policy)[-1], 2e-3)


@pytest.mark.parametrize("weak_field", [True, False])
def test_geodesic_obeys_its_equation_with_dense_symbols(weak_field):
    losses, x = problem((7, 3))
    velocity, epsilon, step = torch.randn(3, dtype=float64), 0.3 / largest(losses, x), 5e-4
    path = geometry.geodesic(losses, x, velocity, [0.0, step, 2 * step], epsilon, weak_field, rtol=1e-12)
    symbols = geometry.christoffel(losses, path[1], epsilon, weak_field)
    v = (path[2] - path[0]) / (2 * step)
    force = -difference(lambda y: gradients(losses, y).mean(0), path[1]) @ v
    expected = force - torch.einsum("kij,i,j->k", symbols, v, v)
    close((path[2] - 2 * path[1] + path[0]) / step**2, expected, 1e-5)


def test_free_exact_geodesic_of_the_graph_of_a_parabola_keeps_its_speed_and_the_weak_field_does_not():
    # f = 0 and D = x^2 make the metric 1 + eps x^2 that of the curve (x, sqrt(eps) x^2 / 2).
    losses, epsilon = curvatures(1, -1), 0.5
    start, times = torch.tensor([0.3], dtype=float64), [0.0, 0.5, 1.0]
    exact, weak = [
        geometry.geodesic(losses, start, torch.ones(1), times, epsilon, weak_field)[:, 0].numpy()
        for weak_field in (False, True)
    ]

    def arc(x):
        slope = math.sqrt(epsilon) * x
        return (slope * numpy.sqrt(1 + slope**2) + numpy.arcsinh(slope)) / (2 * math.sqrt(epsilon))

    speed = math.sqrt(1 + epsilon * 0.09)
    assert numpy.diff(arc(exact)) == pytest.approx(numpy.diff(times) * speed, rel=1e-7)
    assert abs(arc(weak)[-1] - arc(weak)[0] - speed) > 1e-3


def test_geodesic_from_the_negative_gradient_is_the_gradient_flow_where_all_losses_agree():
    losses, x = problem((1, 3))
    assert not geometry.diffusion_matrix(losses, x).any()
    start = -gradients(losses, x).mean(0)
    expected = geometry.gradient_flow(losses, x, TIMES)
    close(geometry.geodesic(losses, x, start, TIMES, Spectral(0.5)), expected, 1e-7)
    close(geometry.rgd_flow(losses, x, TIMES, Spectral(0.5)), expected, 1e-7)


def test_geodesic_of_quadratic_losses_is_the_gradient_flow_and_not_rgd():
    # Constant D: the symbols vanish. The step from (8) to (10) leaves out eps D a, all of the difference here.
    losses, _ = quadratics()
    x = torch.randn(3, dtype=float64)
    start = -gradients(losses, x).mean(0)
    path = geometry.geodesic(losses, x, start, TIMES, Spectral(0.8))
    close(path, geometry.gradient_flow(losses, x, TIMES), 1e-8)
    assert (path - geometry.rgd_flow(losses, x, TIMES, Spectral(0.8))).norm() > 0.1


def test_sgd_has_the_covariance_of_equation_2_for_every_batch_size_drawn_with_replacement():
    losses, x = problem((4, 3))
    rows = gradients(losses, x)
    matrix = diffusion_matrix(rows)
    for size in (1, 2, 3):
        means = torch.stack([rows[list(batch)].mean(0) for batch in itertools.product(range(4), repeat=size)])
        assert_close(size * torch.cov(means.T, correction=0), matrix)
        without = torch.stack([rows[list(batch)].mean(0) for batch in itertools.permutations(range(4), size)])
        assert_close(size * torch.cov(without.T, correction=0), matrix * (4 - size) / 3)
    steps = geometry.sgd_paths(losses, x, 1, lr=0.1, batch_size=2, paths=20_000)[:, 1]
    close(torch.cov(steps.T) * 2 / 0.01, matrix, 0.05)
    close((x - steps.mean(0)) / 0.1, rows.mean(0), 0.05)


def test_sgd_paths_follow_the_definition_and_the_generator():
    losses, x = problem((4, 3))
    paths = geometry.sgd_paths(losses, x, 3, lr=0.1, batch_size=2, paths=5, generator=torch.Generator().manual_seed(1))
    again = geometry.sgd_paths(losses, x, 3, lr=0.1, batch_size=2, paths=5, generator=torch.Generator().manual_seed(1))
    assert paths.shape == (5, 4, 3)
    assert torch.equal(paths, again)
    assert (paths[:, 0] == x).all()
    for path in paths:
        for before, after in itertools.pairwise(path):
            rows = gradients(losses, before)
            steps = [before - 0.1 * rows[list(pair)].mean(0) for pair in itertools.product(range(4), repeat=2)]
            assert min((after - step).norm() for step in steps) < 1e-12


def test_mean_of_sgd_on_quadratic_losses_is_gradient_descent_whatever_d_is():
    losses, centres = quadratics()
    x, mean = torch.randn(3, dtype=float64), centres.mean(0)
    paths = geometry.sgd_paths(losses, x, 20, lr=0.1, batch_size=1, paths=5000)
    close(paths.mean(0)[-1], mean + 0.9**20 * (x - mean), 0.03)
    stationary = 0.1 / (2 - 0.1) * (1 - 0.9**40) * torch.cov(centres.T, correction=0)
    close(torch.cov(paths[:, -1].T), stationary, 0.01)


# What is dropped between (8) and (10)


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


# Eqs. (11) and (12)


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


# What every function does


def test_one_sample_has_no_diffusion():
    losses, x = problem((1, 3))
    identity = torch.eye(3, dtype=float64)
    assert not geometry.diffusion_matrix_pairwise(losses, x).any()
    for policy in (0.5, Spectral(0.5), Rayleigh(0.5)):
        assert torch.equal(geometry.metric(losses, x, policy), identity)
        assert torch.equal(geometry.inverse_metric(losses, x, policy), identity)
        assert not geometry.christoffel(losses, x, policy).any()
        assert not geometry.current(losses, x, policy, 1.0).any()


def test_results_are_float64_and_the_point_is_left_alone():
    losses, _ = quadratics()
    x = torch.zeros(3, requires_grad=True)  # float32
    assert geometry.diffusion_matrix(losses, x).dtype == float64
    assert geometry.gradient_flow(losses, x, [0, 1])[1].dtype == float64
    assert x.grad is None
    assert not geometry.potential_gradient(losses, x, 0.1).requires_grad


def test_losses_may_hold_parameters_that_require_gradients():
    model = torch.nn.Linear(3, 1).double()
    inputs = torch.randn(5, 3, dtype=float64)

    def losses(x):
        return (model(inputs * x)[:, 0]).square()

    x = torch.ones(3)
    assert geometry.rgd_flow(losses, x, [0, 0.1], Spectral(0.5)).isfinite().all()
    assert geometry.geodesic(losses, x, x, [0, 0.1], Spectral(0.5)).isfinite().all()
    assert not geometry.sgd_paths(losses, x, 2, lr=0.1, batch_size=2).requires_grad


def vector(*values):
    return torch.tensor(values, dtype=float64)


centred = quadratics(4, 2)[0]
two = vector(1, 2)
BAD = {
    "integers": (lambda: geometry.metric(centred, torch.tensor([1, 2]), 0.1), TypeError, "x is a torch.int64"),
    "list": (lambda: geometry.metric(centred, [1.0, 2.0], 0.1), TypeError, "x is a list"),
    "matrix": (lambda: geometry.metric(centred, torch.ones(2, 2), 0.1), ValueError, r"shape \(2, 2\).*vector"),
    "scalar x": (lambda: geometry.metric(centred, torch.tensor(1.0), 0.1), ValueError, r"shape \(\)"),
    "x nan": (lambda: geometry.metric(centred, vector(1, math.nan), 0.1), ValueError, r"x is not finite: \(1, nan\)"),
    "tensor of losses": (lambda: geometry.metric(two, two, 0.1), TypeError, "losses is a Tensor"),
    "mean": (lambda: geometry.metric(lambda x: centred(x).mean(), two, 0.1), ValueError, r"not per-sample.*'none'"),
    "column": (lambda: geometry.metric(lambda x: centred(x)[:, None], two, 0.1), ValueError, r"shape \(4, 1\)"),
    "no losses": (lambda: geometry.metric(lambda x: x[:0], two, 0.1), ValueError, r"shape \(0,\)"),
    "number": (lambda: geometry.metric(lambda x: 1.0, two, 0.1), TypeError, "float"),
    "float32": (lambda: geometry.metric(lambda x: centred(x).float(), two, 0.1), TypeError, r"float32.*\.double\(\)"),
    "gradient": (lambda: geometry.metric(lambda x: x.sqrt(), vector(0, 1), 0.1), ValueError, "not finite at x = "),
    "epsilon nan": (lambda: geometry.metric(centred, two, math.nan), ValueError, "nan"),
    "policy inf": (lambda: geometry.metric(centred, two, lambda s: torch.tensor(math.inf)), ValueError, "inf"),
    "epsilon text": (lambda: geometry.metric(centred, two, "0.1"), TypeError, "'0.1'"),
    "singular": (lambda: geometry.metric(centred, two, -100.0), ValueError, "-100 and 1 / lambda_max.*larger"),
    "weak field": (lambda: geometry.inverse_metric(centred, two, 100.0), ValueError, "epsilon is 100 .*Spectral"),
    "policy, weak": (lambda: geometry.inverse_metric(centred, two, Spectral(1.5)), ValueError, "fraction=1.5"),
    "flow beyond": (lambda: geometry.rgd_flow(centred, two, [0, 1], 100.0), ValueError, r"eq. \(6\)"),
    "error beyond": (lambda: geometry.weak_field_error(centred, two, [0.1, -100]), ValueError, "larger"),
    "errors": (lambda: geometry.weak_field_error(centred, two, 0.1), ValueError, r"shape \(\)"),
    "order": (lambda: geometry.derivative_spread(centred, two, 0), ValueError, "order is 0"),
    "beta": (lambda: geometry.current(centred, two, 0.1, 0.0), ValueError, "beta is 0.0"),
    "velocity": (lambda: geometry.geodesic(centred, two, two[:1], [0, 1], 0.1), ValueError, "v0 has 1 .* 2"),
    "term": (lambda: geometry.boundary_term(centred, two, torch.ones(3), 0.1), ValueError, "velocity has 3 .* 2"),
    "times": (lambda: geometry.gradient_flow(centred, two, [0, 1, 1]), ValueError, r"times is \(0, 1, 1\)"),
    "one time": (lambda: geometry.gradient_flow(centred, two, [0.0]), ValueError, "at least two"),
    "batch": (lambda: geometry.sgd_paths(centred, two, 1, lr=0.1, batch_size=0), ValueError, "batch_size is 0"),
    "lr": (lambda: geometry.sgd_paths(centred, two, 1, lr=-1, batch_size=1), ValueError, "lr is -1"),
    "escape": (
        lambda: geometry.gradient_flow(lambda x: -(x**4), vector(1), [0, 1]),
        (ValueError, RuntimeError),
        "integration failed|not finite",
    ),
    "D": (
        lambda: geometry.diffusion_matrix(lambda x: x[:2], torch.zeros(30_000)),
        ValueError,
        "7,200,000,000 bytes.*DiffusionMatrix",
    ),
    "symbols": (
        lambda: geometry.christoffel(lambda x: x[:2].square(), torch.zeros(2000), 0.1),
        ValueError,
        "64,000,000,000 bytes.*geodesic",
    ),
    "closed form": (
        lambda: geometry.christoffel_closed_form(lambda x: x[:2].square(), torch.zeros(2000), 0.1),
        ValueError,
        "64,000,000,000 bytes",
    ),
    "pairs": (
        lambda: geometry.diffusion_matrix_pairwise(lambda x: x[0].expand(40_000), torch.zeros(2)),
        ValueError,
        "12,799,680,000 bytes.*diffusion_matrix",
    ),
    "third derivatives": (
        lambda: geometry.derivative_spread(lambda x: x[:2].square(), torch.zeros(2000), 3),
        ValueError,
        "128,000,000,000 bytes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()


def test_flows_of_many_weights_need_no_dense_matrix():
    x = torch.ones(30_000)
    target = torch.linspace(0, 1, 2, dtype=float64)[:, None]

    def losses(x):
        return (x - target).square().sum(1) / 2

    path = geometry.rgd_flow(losses, x, [0, 0.1], Spectral(0.5), rtol=1e-3)
    assert path.shape == (2, 30_000)
