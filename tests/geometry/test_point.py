"""What all functions of the geometry have in common: one sample, dtypes, and which arguments are refused."""

import math

import pytest
import torch
from geometry_cases import float64, problem, quadratics

from rgd_ext import Rayleigh, Spectral, geometry


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
