"""Values may come from a `torch.autograd.Function` of raw parameters, on their way to the batch."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from capturing import B, captured_grad, double, loss_of
from models import Net
from oracle import assert_close, weak_field
from torch import nn

import rgd_ext

N, M = 4, 6


class Round(torch.autograd.Function):
    """Whole numbers, whose gradient goes straight through."""

    @staticmethod
    def forward(ctx, w):
        return w.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Product(torch.autograd.Function):
    """A scaled product, with a backward of its own."""

    @staticmethod
    def forward(ctx, left, right, scale):
        ctx.save_for_backward(left, right)
        ctx.scale = scale
        return left @ right * scale

    @staticmethod
    def backward(ctx, grad):
        left, right = ctx.saved_tensors
        grad = grad * ctx.scale
        return grad @ right.T, left.T @ grad, None


def factored(m, x):
    return F.linear(m.body(x), Product.apply(m.p["left"], m.p["right"], 0.5))


FUNCTIONS = {
    "straight through": lambda: Net(
        lambda m, x: m.body(x) @ Round.apply(m.w).T, body=nn.Linear(5, 5), w=nn.Parameter(3 * torch.randn(3, 5))
    ),
    "of two parameters": lambda: Net(
        factored, body=nn.Linear(5, 4), p=nn.ParameterDict({"left": torch.randn(3, 2), "right": torch.randn(2, 4)})
    ),
    "twice": lambda: Net(
        lambda m, x: m.body(x) @ Round.apply(Round.apply(m.w) * 2).T * Round.apply(m.w).sum(),
        body=nn.Linear(5, 5),
        w=nn.Parameter(3 * torch.randn(3, 5)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_raw_parameters_go_through_autograd_functions(name):
    model, x = FUNCTIONS[name]().double(), double(B, 5)
    output = model(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(output), output)
    rows = []
    for i in range(B):
        grads = torch.autograd.grad(model(x[i : i + 1]), list(model.parameters()), grad[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in grads]))
    assert_close(captured_grad(model, x), weak_field(B * torch.stack(rows)))


def test_a_value_kept_from_another_call_is_found():
    def forward(m, x):
        if not hasattr(m, "kept"):
            m.kept = m.p * 2
        return m.body(x) * m.kept

    model, x = Net(forward, body=nn.Linear(5, 4), p=nn.Parameter(torch.randn(4))), torch.randn(B, 5)
    model(x)
    with rgd_ext.precondition(model), pytest.raises(RuntimeError, match=r"'p' of shape .* outside the forward"):
        loss_of(model(x)).backward()


def test_graphs_of_values_go_with_the_outputs():
    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.kept = torch.ones(3)
            held.append(weakref.ref(ctx.kept))
            return w * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    held = []
    model = Net(lambda m, x: m.body(x) @ Held.apply(m.w), body=nn.Linear(N, N), w=nn.Parameter(torch.randn(N, M)))
    with rgd_ext.precondition(model, verify=False):
        output = model(torch.randn(B, N))
        assert held[0]() is not None
        del output
        assert held[0]() is None
