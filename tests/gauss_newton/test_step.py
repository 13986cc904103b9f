"""Steps against the formula with the explicit Jacobian."""

import pytest
import torch
import torch.nn.functional as F
from fitting import explicit, flat, levenberg_marquardt, network, points
from models import GPT
from oracle import assert_close
from torch import nn

import rgd_ext

DAMPING = 1e-2


class Tied(nn.Module):
    """A weight in two layers and as an embedding, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.middle = nn.Linear(4, 4)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = torch.tanh(self.middle(self.embedding(tokens)))
        return self.head(self.middle(x)).sum(1)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.GroupNorm(3, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    )


# Model, inputs, number of outputs.
MODELS = {
    "MLP": (lambda: network(5, 3), lambda b: torch.randn(b, 5), 3),
    "convolutions": (convolutional, lambda b: torch.randn(b, 1, 6, 6), 3),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)),
                  lambda b: torch.randint(7, (b, 3)), 3),
    "tied": (Tied, lambda b: torch.randint(7, (b, 3)), 7),
    "sequences": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)),
                  lambda b: torch.randn(b, 6, 4), 3),
    "GPT": (lambda: nn.Sequential(GPT(6, 4, 5), nn.Flatten(), nn.Linear(30, 3)), lambda b: torch.randint(6, (b, 5)), 3),
}  # fmt: skip


def problem(name, size=6, dtype=torch.float64):
    """A model, and closures with k = 1 and k = 3 residuals for each sample."""
    make, inputs, outputs = MODELS[name]
    model, x = make().to(dtype), inputs(size)
    x = x.to(dtype) if x.is_floating_point() else x
    target = torch.randn(size, outputs, dtype=dtype)
    return model, {1: lambda: (model(x) - target).square().sum(1), 3: lambda: (model(x) - target)[:, :3].sin()}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_formula(name, k):
    model, closures = problem(name)
    expected = levenberg_marquardt(closures[k], [*model.parameters()], DAMPING)
    loss = closures[k]().square().sum() / 2
    optimizer = rgd_ext.GaussNewton(model, damping=DAMPING, adaptive=False)
    assert_close(optimizer.step(closures[k]), loss.detach())
    assert (flat(model.parameters()) - expected).abs().max() < 1e-10
    assert all(p.grad is None for p in model.parameters())


def test_an_adaptive_step_that_is_accepted_at_once_is_the_same():
    model, closures = problem("MLP")
    expected = levenberg_marquardt(closures[3], [*model.parameters()], 1.0, lr=0.5)
    optimizer = rgd_ext.GaussNewton(model, lr=0.5, damping=1.0)
    optimizer.step(closures[3])
    assert optimizer.report.trials == 1
    assert optimizer.report.accepted
    assert (flat(model.parameters()) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("k", [1, 3])
def test_with_more_residuals_than_weights_the_step_is_the_same(k):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = torch.randn(40, 2, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    closure = {1: lambda: (model(x) - y).sum(1).exp(), 3: lambda: model(x) - y}[k]
    expected = levenberg_marquardt(closure, [*model.parameters()], DAMPING)
    optimizer = rgd_ext.GaussNewton(model, damping=DAMPING, adaptive=False)
    optimizer.step(closure)
    assert (optimizer.report.rows, optimizer.report.order) == (40 * k, 21)
    assert (flat(model.parameters()) - expected).abs().max() < 1e-10


def test_batches_of_different_sizes_are_fitted_together():
    model, interior, boundary = network(), points(9), points(4)
    unused = nn.Linear(2, 2).double()
    model.append(nn.Identity())
    model.unused = unused

    def closure():
        return model[:5](interior)[:, 0] - 1, torch.cat([model[:5](boundary), unused(boundary)], 1), model[0](interior)

    expected = levenberg_marquardt(closure, [*model.parameters()], DAMPING)
    optimizer = rgd_ext.GaussNewton(model, damping=DAMPING, adaptive=False)
    optimizer.step(closure)
    assert optimizer.report.rows == 9 + 4 * 3 + 9 * 9
    assert (flat(model.parameters()) - expected).abs().max() < 1e-10


def test_a_linear_model_is_solved_in_one_step():
    model = nn.Linear(5, 2).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    rgd_ext.GaussNewton(model, damping=0.0, adaptive=False).step(lambda: model(x) - y)
    design = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, y).solution.T
    assert_close(torch.cat([model.weight, model.bias[:, None]], 1).detach(), expected)


def test_an_underdetermined_linear_model_is_solved_by_the_shortest_step():
    model = nn.Linear(20, 1).double()
    x, y = torch.randn(7, 20, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    before, (residuals, jacobian) = (
        flat(model.parameters()),
        explicit(lambda: model(x)[:, 0] - y, [*model.parameters()]),
    )
    rgd_ext.GaussNewton(model, damping=0.0, adaptive=False).step(lambda: model(x)[:, 0] - y)
    assert_close(flat(model.parameters()), before - torch.linalg.pinv(jacobian) @ residuals)
    assert (model(x)[:, 0] - y).abs().max() < 1e-12


@pytest.mark.parametrize("size", [6, 60])
def test_groups_have_rates_dampings_and_decays_of_their_own(size):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(size, 3, dtype=torch.float64), torch.randn(size, 2, dtype=torch.float64)
    model[2].weight.requires_grad_(False)
    groups = [
        {"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.1},
        {"params": [model[2].bias], "damping": 0.3},
        {"params": [model[4].weight], "weight_decay": 0.2},
        {"params": [model[4].bias], "lr": 0.0},
        {"params": [model[2].weight]},
    ]
    chosen = [*model[0].parameters(), model[2].bias, model[4].weight]
    sizes = [p.numel() for p in chosen]

    def of_each(*values):
        return torch.cat([torch.full((n,), v, dtype=torch.float64) for n, v in zip(sizes, values, strict=True)])

    residuals, jacobian = explicit(lambda: model(x) - y, chosen)
    decays, dampings = of_each(0.1, 0.1, 0, 0.2), of_each(DAMPING, DAMPING, 0.3, DAMPING)
    matrix = jacobian.T @ jacobian + torch.diag(decays + dampings)
    step = torch.linalg.solve(matrix, jacobian.T @ residuals + decays * flat(chosen))
    expected, others = flat(chosen) - of_each(0.5, 0.5, 1, 1) * step, [model[4].bias.clone(), model[2].weight.clone()]
    optimizer = rgd_ext.GaussNewton(model, damping=DAMPING, adaptive=False, params=groups)
    optimizer.step(lambda: model(x) - y)
    assert_close(flat(chosen), expected)
    assert optimizer.report.order == {6: 12, 60: sum(sizes)}[size]
    assert torch.equal(model[4].bias, others[0])
    assert torch.equal(model[2].weight, others[1])


@pytest.mark.parametrize("size", [4, 60])
def test_momentum_pulls_the_step_towards_the_one_before(size):
    """Goldshlager, Abrahamsen and Lin, arXiv 2401.10190: |r - J s|^2 + damping |s - momentum s_before|^2."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    parameters, before = [*model.parameters()], 0
    optimizer = rgd_ext.GaussNewton(model, lr=0.3, damping=DAMPING, adaptive=False, momentum=0.8)
    for _ in range(3):
        x, y = torch.randn(size, 3, dtype=torch.float64), torch.randn(size, 2, dtype=torch.float64)
        residuals, jacobian = explicit(lambda: model(x) - y, parameters)  # noqa: B023  # called at once
        matrix = jacobian.T @ jacobian + DAMPING * torch.eye(26, dtype=torch.float64)
        step = torch.linalg.solve(matrix, jacobian.T @ residuals + DAMPING * 0.8 * before)
        expected, before = flat(parameters) - 0.3 * step, step
        optimizer.step(lambda: model(x) - y)  # noqa: B023
        assert_close(flat(parameters), expected)


def test_a_float32_model_may_have_a_gramian_in_float64():
    model, closures = problem("sequences", 20, torch.float32)
    parameters, damping = [*model.parameters()], 1e-8
    residuals, jacobian = explicit(closures[3], parameters)
    gram = jacobian @ jacobian.T + damping * torch.eye(60, dtype=torch.float64)
    step, before, errors = jacobian.T @ torch.linalg.solve(gram, residuals), flat(parameters), {}
    for dtype in (None, torch.float64):
        with torch.no_grad():
            nn.utils.vector_to_parameters(before.clone(), parameters)
        rgd_ext.GaussNewton(model, damping=damping, adaptive=False, dtype=dtype).step(closures[3])
        errors[dtype] = ((before - flat(parameters) - step).norm() / step.norm()).item()
    assert errors[torch.float64] < 1e-3
    assert errors[None] > 10 * errors[torch.float64]


def test_dropout_and_buffers_are_those_of_one_forward():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 1))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layers(x)[:, 0]

    model, x = Counting().double(), torch.randn(9, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    model(x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    optimizer = rgd_ext.GaussNewton(model, geodesic=True)
    optimizer.step(lambda: model(x) - 1)
    assert torch.equal(torch.get_rng_state(), after)
    assert model.calls == 2  # with the one before


def test_the_model_is_an_ordinary_one_outside_of_steps():
    model, x = network(), points(5)
    rgd_ext.GaussNewton(model)
    inputs = x.clone().requires_grad_()
    slope = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)[0]
    slope.square().sum().backward()
    expected = torch.autograd.grad(F.mse_loss(model(x), x[:, :1]), model[0].weight)[0]
    model.zero_grad()
    F.mse_loss(model(x), x[:, :1]).backward()
    assert_close(model[0].weight.grad, expected)
