"""Derivatives by inputs are ordinary; others than the gradient by the parameters belong under `handle.paused()`."""

import copy

import pytest
import torch
from capturing import behind, double, loss_of
from models import mlp
from oracle import assert_close, flat, flat_grad
from torch import nn
from torch.autograd import forward_ad

import rgd_ext


def test_paused_is_ordinary_autograd():
    model, x = mlp().double(), double(5, 6).requires_grad_()

    def penalty(model):
        (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
        return grad.square().sum()

    expected = torch.autograd.grad(penalty(model), list(model.parameters()), allow_unused=True)
    with rgd_ext.precondition(model) as handle, handle.paused():
        grads = torch.autograd.grad(penalty(model), list(model.parameters()), allow_unused=True)
        penalty(model).backward()
    for grad, other, parameter in zip(grads, expected, model.parameters(), strict=True):
        assert (grad is None and other is None) or torch.equal(grad, other)
        assert other is None or torch.equal(parameter.grad, other)


def test_autograd_grad_with_respect_to_parameters_names_paused():
    model = mlp()
    with rgd_ext.precondition(model):
        loss = loss_of(model(torch.randn(5, 6)))
        with pytest.raises(RuntimeError, match=r"paused\(\)"):
            torch.autograd.grad(loss, list(model.parameters()))
        assert model[0].weight.grad is None


def test_autograd_grad_with_respect_to_inputs_is_ordinary():
    model, x = mlp(), torch.randn(5, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(model(x)), x)
    with rgd_ext.precondition(model) as handle:
        (grad,) = torch.autograd.grad(loss_of(model(x)), x)
        assert handle.stats is None
    assert_close(grad, expected)
    assert model[0].weight.grad is None


def squared_gradient_by_backward(model, x):
    loss_of(model(x)).backward(create_graph=True)
    return flat_grad(model).square().sum()


def squared_gradient_by_grad(model, x):
    grads = torch.autograd.grad(loss_of(model(x)), list(model.parameters()), create_graph=True)
    return flat(grads).square().sum()


def squared_gradient_of_inputs(model, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    return grad.square().sum()


PENALTIES = squared_gradient_by_backward, squared_gradient_by_grad, squared_gradient_of_inputs


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda f: f.__name__)
def test_second_derivatives_name_paused_and_work_there(penalty):
    model, x = mlp().double(), double(5, 6)
    plain = copy.deepcopy(model)
    penalty(plain, x).backward()
    with rgd_ext.precondition(model) as handle:
        with pytest.raises(RuntimeError, match=r"(create_graph=True|autograd\.grad).*paused\(\)"):
            penalty(model, x).backward()
        assert all(p.grad is None for p in model.parameters())
        with handle.paused():
            penalty(model, x).backward()
    assert torch.equal(flat_grad(model), flat_grad(plain))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_gradient_penalty_names_paused(activation):
    critic = nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 1))
    x = torch.randn(6, 4, requires_grad=True)
    with rgd_ext.precondition(critic):
        (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        loss = critic(x).mean() + ((grad.norm(dim=1) - 1) ** 2).mean()
        with pytest.raises(RuntimeError, match=r"gradient penalty, under `with handle\.paused\(\):`"):
            loss.backward()
    assert all(p.grad is None for p in critic.parameters())


def test_second_derivatives_by_inputs_are_ordinary():
    model, x = mlp().double(), torch.randn(6, dtype=torch.float64)
    expected = torch.autograd.functional.hessian(lambda x: model(x[None]).sin().sum(), x)
    with rgd_ext.precondition(model):
        got = torch.autograd.functional.hessian(lambda x: model(x[None]).sin().sum(), x)
    assert_close(got, expected)


def test_penalty_on_weights_is_refused_and_works_paused():
    model, x = mlp(), torch.randn(5, 6)
    with rgd_ext.precondition(model) as handle:
        with pytest.raises(RuntimeError, match="paused"):
            (loss_of(model(x)) + model[0].weight.square().sum()).backward()
        model.zero_grad()
        loss_of(model(x)).backward()
        before = model[0].weight.grad.clone()
        with handle.paused():
            model[0].weight.square().sum().backward()
    assert_close(model[0].weight.grad, before + 2 * model[0].weight.detach())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by forward_ad itself
def test_forward_mode_is_refused_and_works_paused():
    model, x = nn.Linear(3, 2).double(), double(4, 3)
    with rgd_ext.precondition(model) as handle, forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="paused"):
            model(dual)
        assert model(x).requires_grad
        with handle.paused():
            tangent = forward_ad.unpack_dual(model(dual)).tangent
    assert_close(tangent, model.weight.sum(1).expand(4, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by forward_ad itself
def test_tangent_that_comes_in_inside_is_refused():
    class WithTangent(nn.Module):
        def forward(self, x):
            return forward_ad.make_dual(x, torch.ones_like(x))

    model = behind(WithTangent(), nn.Linear(4, 3))
    with rgd_ext.precondition(model), forward_ad.dual_level(), pytest.raises(RuntimeError, match="paused"):
        model(double(5, 4))
