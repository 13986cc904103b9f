"""Residuals that contain derivatives of the model with respect to its inputs."""

import pytest
import torch
from fitting import (
    DERIVATIVES,
    by_autograd,
    by_hessian,
    by_reverse_of_gradient,
    flat,
    levenberg_marquardt,
    network,
    points,
)
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

import rgd_ext

DAMPING = 1e-2
# Forward-mode derivatives of torch load its decompositions, which were written for torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is"),
    pytest.mark.filterwarnings("ignore:.*runs for one sample after the other:UserWarning"),
]


def assert_exact(model, closure, **options):
    expected = levenberg_marquardt(closure, [*model.parameters()], DAMPING)
    optimizer = rgd_ext.GaussNewton(model, damping=DAMPING, adaptive=False, **options)
    optimizer.step(closure)
    assert (flat(model.parameters()) - expected).abs().max() < 1e-10
    return optimizer


class Residual(nn.Module):
    """A residual as a module."""

    def __init__(self, derivatives, net):
        super().__init__()
        self.derivatives, self.net = derivatives, net

    def forward(self, x):
        return self.derivatives(self.net, x)


class Dense(nn.Module):
    """A linear layer of one's own."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.w = nn.Parameter(torch.randn(inputs, outputs, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(outputs, dtype=torch.float64))

    def forward(self, x):
        return x @ self.w + self.b


def normalised():
    return nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)).double()


def own_layers():
    return nn.Sequential(Dense(2, 6), nn.Tanh(), Dense(6, 1))


@pytest.mark.parametrize("derivatives", DERIVATIVES)
def test_derivatives_are_followed_through_linear_layers(derivatives):
    net, x = network(), points(7)
    assert_exact(net, lambda: derivatives(net, x))
    model = Residual(derivatives, network())
    assert_exact(model, lambda: model(x))


@pytest.mark.parametrize("derivatives", DERIVATIVES)
@pytest.mark.parametrize("make", [normalised, own_layers])
def test_a_module_with_other_layers_is_captured_as_one_unit(make, derivatives):
    model, x = Residual(derivatives, make()), points(7)
    assert_exact(model, lambda: model(x))


def test_several_residuals_and_batches():
    net, interior, boundary = network(), points(6), points(4)

    def closure():
        x = interior.clone().requires_grad_()
        value = net(x)
        slope = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
        return torch.cat([slope, value], 1), net(boundary)[:, 0] - 1, by_hessian(net, boundary)

    assert assert_exact(net, closure).report.rows == 3 * 6 + 4 + 4


def test_tied_frozen_and_twice_used_weights():
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Tanh())
    net.append(nn.Linear(5, 1)).double()
    net[4].weight = net[2].weight
    net[0].weight.requires_grad_(False)
    net[6].bias.requires_grad_(False)
    x, before = points(7), net[0].weight.clone()

    def closure():
        return by_autograd(net, x) + by_autograd(net, x.flip(1))

    free = [p for p in net.parameters() if p.requires_grad]
    expected = levenberg_marquardt(closure, free, DAMPING)
    rgd_ext.GaussNewton(net, damping=DAMPING, adaptive=False).step(closure)
    assert (flat(free) - expected).abs().max() < 1e-10
    assert torch.equal(net[0].weight, before)


def test_a_coefficient_of_the_equation_is_fitted():
    class Inverse(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.coefficient = network(), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x):
            x = x.clone().requires_grad_()
            slope = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]
            return slope[:, 0] - self.coefficient * slope[:, 1]

    model, x = Inverse(), points(7)
    assert_exact(model, lambda: model(x))


def test_functional_call_and_inner_maps():
    net, x, directions = network(), points(7), points(3)

    def slope(z):
        return grad(lambda y: functional_call(net, dict(net.named_parameters()), (y,))[0])(z)

    assert_exact(net, lambda: vmap(lambda z: vmap(lambda v: (slope(z) * v).sum())(directions).prod())(x))


def test_derivatives_of_values_alone_and_of_other_tensors_are_no_matter():
    net, x = network(), points(7)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def closure():
        inputs = x.clone().requires_grad_()
        weights = torch.autograd.grad(net(inputs).sum(), inputs)[0].norm(dim=1)  # without a graph
        other = torch.autograd.grad((scale * x).sum(), scale, create_graph=True)[0]
        return weights * other * by_hessian(net, x)

    assert_exact(net, closure)
    assert scale.grad is None


def test_collocation_points_get_no_gradient():
    net, x = network(), points(7).requires_grad_()

    def closure():
        return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].sum(1)

    assert_exact(net, closure)
    assert x.grad is None


def test_the_closure_that_runs_again_meets_the_same_random_numbers():
    net, drawn = network(), []

    def closure():
        drawn.append(points(5))
        return by_autograd(net, drawn[-1])

    torch.manual_seed(1)
    rgd_ext.GaussNewton(net).step(closure)
    assert len(drawn) > 3
    assert all(torch.equal(x, drawn[0]) for x in drawn)
    assert not torch.equal(points(5), drawn[0])


def closed_around(make, derivatives):
    net, x = make(), points(6)
    return net, lambda: derivatives(net, x)


@pytest.mark.parametrize("derivatives", DERIVATIVES)
@pytest.mark.parametrize("make", [normalised, own_layers])
def test_other_layers_outside_of_a_module_are_an_error_with_the_remedy(make, derivatives):
    net, closure = closed_around(make, derivatives)
    before = flat(net.parameters())
    optimizer = rgd_ext.GaussNewton(net)
    with pytest.raises(RuntimeError, match=r"Compute the residuals in the forward of a module.*captured as one unit"):
        optimizer.step(closure)
    assert torch.equal(flat(net.parameters()), before)
    model, x = Residual(derivatives, net), points(6)
    rgd_ext.handle_of(net).remove()
    assert_exact(model, lambda: model(x))


def test_a_parameter_in_the_closure_is_an_error_with_the_remedy():
    model = Residual(None, network())
    model.coefficient, x = nn.Parameter(torch.ones((), dtype=torch.float64)), points(6)
    optimizer = rgd_ext.GaussNewton(model)
    with pytest.raises(RuntimeError, match=r"'coefficient'.*in the forward of a module"):
        optimizer.step(lambda: by_hessian(model.net, x) - model.coefficient)
    model.derivatives = lambda net, x: by_hessian(net, x) - model.coefficient
    rgd_ext.handle_of(model).remove()
    assert_exact(model, lambda: model(x))


def test_a_derivative_of_the_whole_batch_is_an_error_with_the_remedy():
    net, x = network(), points(6)
    optimizer = rgd_ext.GaussNewton(net, damping=DAMPING, adaptive=False)
    with pytest.raises(ValueError, match=r"'0' was differentiated.*of 6 samples.*torch.func.vmap"):
        optimizer.step(lambda: jacrev(lambda z: net(z).sum(0))(x)[0].sum(1))
    expected = levenberg_marquardt(lambda: vmap(lambda z: jacrev(net)(z)[0].sum())(x), [*net.parameters()], DAMPING)
    optimizer.step(lambda: vmap(lambda z: jacrev(net)(z)[0].sum())(x))
    assert (flat(net.parameters()) - expected).abs().max() < 1e-10


def test_a_value_that_all_samples_share_is_an_error():
    net, x = network(), points(6)
    optimizer = rgd_ext.GaussNewton(net)
    with pytest.raises(ValueError, match="samples"):
        optimizer.step(lambda: by_hessian(net, x) + net(torch.zeros(1, 2, dtype=torch.float64))[0, 0])


def test_a_poisson_equation_is_solved():
    net, x = network(), points(60)
    source = 2 * torch.pi**2 * (torch.pi * x).sin().prod(1)

    def solution(z):
        return (z * (1 - z)).prod() * net(z)[0]

    optimizer = rgd_ext.GaussNewton(net, geodesic=True)
    for _ in range(30):
        optimizer.step(lambda: vmap(lambda z: torch.trace(hessian(solution)(z)))(x) + source)
    fresh = points(100)
    with torch.no_grad():
        error = vmap(solution)(fresh) - (torch.pi * fresh).sin().prod(1)
    assert error.square().mean().sqrt() < 1e-3


class Coefficient(nn.Module):
    """An equation with a coefficient, which is used in different places."""

    def __init__(self, place):
        super().__init__()
        self.net, self.c, self.place = network(), nn.Parameter(torch.tensor(0.7, dtype=torch.float64)), place

    def forward(self, x):
        return self.place(self, x)


def slope_of(net):
    return lambda z: grad(lambda y: net(y)[0])(z)[0]


def in_a_gradient(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad((model.c * model.net(x)).sum(), x, create_graph=True)[0].sum(1)


PLACES = {
    "in a map": lambda m, x: vmap(lambda z: m.c * slope_of(m.net)(z) + z[0])(x),
    "in a map without derivatives": lambda m, x: vmap(lambda z: m.c * z[0])(x) + m.net(x)[:, 0],
    "an argument of a map": lambda m, x: vmap(lambda z, c: c * slope_of(m.net)(z), in_dims=(0, None))(x, m.c),
    "in a gradient": in_a_gradient,
    "inside of the network": lambda m, x: by_autograd(lambda y: m.net(torch.sin(m.c * y)), x),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_coefficient_in_any_place_of_the_forward_is_fitted(place):
    model, x = Coefficient(PLACES[place]), points(7)
    assert_exact(model, lambda: model(x))


def test_parametrised_weights_are_captured_in_a_module():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 5)), nn.Tanh(), nn.Linear(5, 1)).double()
    model, x = Residual(by_reverse_of_gradient, net), points(7)
    assert_exact(model, lambda: model(x))


def test_a_batched_gradient():
    net, x = network(), points(7)

    def closure():
        inputs = x.clone().requires_grad_()
        value = net(inputs)
        ones = torch.ones_like(value)[None]
        return torch.autograd.grad(value, inputs, ones, create_graph=True, is_grads_batched=True)[0][0]

    before = flat(net.parameters())
    with pytest.raises((ValueError, RuntimeError), match=r"samples|forward of a module|create_graph"):
        rgd_ext.GaussNewton(net).step(closure)
    assert torch.equal(flat(net.parameters()), before)


def test_derivatives_under_autocast():
    net, x = network().float(), points(7).float()

    def closure():
        inputs = x.clone().requires_grad_()
        return torch.autograd.grad(net(inputs).float().sum(), inputs, create_graph=True)[0].sum(1) - 1

    before, expected = flat(net.parameters()), levenberg_marquardt(closure, [*net.parameters()], 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        rgd_ext.GaussNewton(net, damping=1.0, adaptive=False).step(closure)
    assert (flat(net.parameters()) - expected).norm() < 0.1 * (before - expected).norm()


def test_sparse_embeddings():
    net, x = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)).double(), torch.tensor([0, 2, 2, 4])
    assert_exact(net, lambda: net(x)[:, 0] - 1)
