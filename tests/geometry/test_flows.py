"""Curves against closed forms and their equations: eqs. (1), (4), (8) and (10)."""

import itertools
import math

import numpy
import pytest
import torch
from geometry_cases import (
    close,
    curvatures,
    difference,
    float64,
    gradients,
    largest,
    problem,
    quadratics,
)
from oracle import assert_close, diffusion_matrix

import rgd_ext
from rgd_ext import Fixed, Spectral, Trace, geometry

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
