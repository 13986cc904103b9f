"""Adaptive steps: those that are tried, rejected and taken."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from fitting import explicit, flat, network, points
from oracle import assert_close
from torch import nn

import rgd_ext


class Rosenbrock(nn.Module):
    """The residuals 10 (x_2 - x_1^2) and 1 - x_1 of each sample, for weights x that all share."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def forward(self, ones):
        first, second = (ones * self.x).unbind(1)
        return torch.stack([10 * (second - first**2), 1 - first], 1)


ONE = torch.ones(1, 2, dtype=torch.float64)


@pytest.mark.parametrize("geodesic", [False, True])
def test_rosenbrock_is_solved(geodesic):
    model = Rosenbrock()
    optimizer = rgd_ext.GaussNewton(model, geodesic=geodesic)
    losses = [optimizer.step(lambda: model(ONE)).item() for _ in range(40)]
    assert losses[0] == pytest.approx(12.1)
    assert all(after <= before for before, after in pairwise(losses))
    assert_close(model.x.detach(), torch.ones(2, dtype=torch.float64))


def test_the_accepted_step_is_that_of_the_damping_that_is_reported():
    model = Rosenbrock()
    optimizer = rgd_ext.GaussNewton(model, damping=1e-6)
    for _ in range(8):
        before, (residuals, jacobian) = flat([model.x]), explicit(lambda: model(ONE), [model.x])
        optimizer.step(lambda: model(ONE))
        report = optimizer.report
        matrix = jacobian.T @ jacobian + report.damping * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(matrix, jacobian.T @ residuals)
        assert_close(model.x.detach(), before - step)
        fall = (residuals.square().sum() - model(ONE).square().sum()) / 2
        promised = (residuals.square().sum() - (residuals - jacobian @ step).square().sum()) / 2
        assert report.gain_ratio == pytest.approx((fall / promised).item())
        assert optimizer.param_groups[0]["damping"] == pytest.approx(
            report.damping * max(1 / 3, 1 - (2 * min(report.gain_ratio, 1) - 1) ** 3)
        )


def test_rejected_trials_raise_the_damping_by_powers_that_double():
    model = Rosenbrock()
    optimizer = rgd_ext.GaussNewton(model, damping=1e-6)
    dampings, trials = [], []
    for _ in range(10):
        dampings.append(optimizer.param_groups[0]["damping"])
        optimizer.step(lambda: model(ONE))
        trials.append(optimizer.report.trials)
        rejected = trials[-1] - 1
        assert optimizer.report.damping == pytest.approx(dampings[-1] * 2 ** (rejected * (rejected + 1) / 2))
    assert max(trials) > 1


class Worse(nn.Module):
    """A model whose residuals are larger anywhere but where it starts; it counts its calls in a buffer."""

    def __init__(self, elsewhere):
        super().__init__()
        self.layer, self.elsewhere = nn.Linear(3, 1).double(), elsewhere
        self.start = flat(self.layer.parameters())
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        is_there = torch.equal(flat(self.layer.parameters()), self.start)
        return self.layer(x)[:, 0] + (0 if is_there else self.elsewhere)


@pytest.mark.parametrize("elsewhere", [100.0, math.nan, math.inf])
@pytest.mark.parametrize("geodesic", [False, True])
def test_a_step_that_is_rejected_changes_nothing(elsewhere, geodesic):
    model = Worse(elsewhere)
    optimizer = rgd_ext.GaussNewton(model, geodesic=geodesic)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    x = torch.randn(6, 3, dtype=torch.float64)
    loss = optimizer.step(lambda: model(x))
    assert not optimizer.report.accepted
    assert optimizer.report.trials > 5
    assert torch.equal(model.layer.weight, before["layer.weight"])
    assert torch.equal(model.layer.bias, before["layer.bias"])
    assert model.calls == 1
    assert optimizer.state_dict() == state
    assert loss == model(x).square().sum() / 2


def test_where_the_closure_raises_at_a_trial_the_parameters_are_put_back():
    model, x = network(), points(5)
    before = flat(model.parameters())

    def closure():
        if not torch.equal(flat(model.parameters()), before):
            raise ArithmeticError("outside of the domain")
        return model(x)[:, 0]

    optimizer = rgd_ext.GaussNewton(model)
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ArithmeticError, match="outside of the domain"):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), before)
    assert optimizer.state_dict() == state


def test_a_stationary_point_is_left_as_it_is():
    model = nn.Linear(3, 1).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    y = torch.randn(20, dtype=torch.float64)
    optimizer = rgd_ext.GaussNewton(model, damping=1e-10)
    for _ in range(4):
        optimizer.step(lambda: model(x)[:, 0] - y)
    before = flat(model.parameters())
    optimizer.step(lambda: model(x)[:, 0] - y)
    assert_close(flat(model.parameters()), before)
    exact = nn.Linear(3, 1).double()
    optimizer = rgd_ext.GaussNewton(exact)
    before = flat(exact.parameters())
    assert optimizer.step(lambda: exact(x) - exact(x).detach()) == 0
    assert not optimizer.report.accepted
    assert torch.equal(flat(exact.parameters()), before)


def test_weight_decay_is_part_of_the_loss_that_falls():
    model, x, y = network(3, 2), points(9, 3), points(9, 2)
    optimizer = rgd_ext.GaussNewton(model, weight_decay=0.05)

    def loss():
        with torch.no_grad():
            return ((model(x) - y).square().sum() / 2 + 0.05 / 2 * flat(model.parameters()).square().sum()).item()

    losses = [loss()]
    for _ in range(400):
        optimizer.step(lambda: model(x) - y)
        losses.append(loss())
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))
    residuals, jacobian = explicit(lambda: model(x) - y, [*model.parameters()])
    assert (jacobian.T @ residuals + 0.05 * flat(model.parameters())).norm() < 1e-5


def test_the_geodesic_acceleration_is_that_of_the_formula():
    """s + J^+ r'' / 2, with the second derivative of the residuals along s by a difference."""
    model = Rosenbrock()
    before, (residuals, jacobian) = flat([model.x]), explicit(lambda: model(ONE), [model.x])
    damping = 5.0
    inverse = torch.linalg.inv(jacobian.T @ jacobian + damping * torch.eye(2, dtype=torch.float64)) @ jacobian.T
    step = inverse @ residuals
    second = torch.tensor([-20 * step[0] ** 2, 0])  # of the residuals; quadratic, so that a difference is exact
    optimizer = rgd_ext.GaussNewton(model, damping=damping, geodesic=True)
    optimizer.step(lambda: model(ONE))
    assert optimizer.report.geodesic
    assert optimizer.report.trials == 1
    assert_close(model.x.detach(), before - step - inverse @ second / 2)


def test_steps_of_many_weights_fit_to_rounding():
    model, x = network(1), torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]
    y = torch.sin(3 * x)
    optimizer = rgd_ext.GaussNewton(model, geodesic=True)
    for _ in range(150):
        loss = optimizer.step(lambda: model(x) - y)
    assert loss < 1e-12
    assert optimizer.report.order == 30


@pytest.mark.parametrize("rates", [(1.0, 0.5), (0.1, 1.0), (2.5, 2.5), (0.01, 5.0)])
def test_any_rates_lead_down(rates):
    model, x = network(), points(12)
    groups = [
        {"params": model[0].parameters(), "lr": rates[0]},
        {"params": [*model[2].parameters(), *model[4].parameters()], "lr": rates[1]},
    ]
    optimizer = rgd_ext.GaussNewton(model, params=groups)
    losses = []
    for _ in range(20):
        losses.append(optimizer.step(lambda: model(x)[:, 0] - x.prod(1)))
        assert optimizer.report.accepted
    assert all(after < before for before, after in pairwise(losses))
