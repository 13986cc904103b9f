"""Raw parameters of a container, which meet the batch in its own forward, match the oracle or are refused."""

import pytest
import torch
import torch.nn.functional as F
from capturing import assert_exact, captured_grad, double, expected_direction, loss_of
from models import Net
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext

RAW = {
    "bias (n,)": ((4,), lambda m, x: m.body(x) + m.p),
    "bias from the left": ((4,), lambda m, x: m.p + m.body(x)),
    "gain (1, n)": ((1, 4), lambda m, x: m.body(x) * m.p),
    "in place": ((1, 4), lambda m, x: m.body(x).add_(m.p)),
    "augmented assignment": ((4,), lambda m, x: _plus(m.body(x), m.p)),
    "matrix": ((4, 3), lambda m, x: m.body(x) @ m.p),
    "linear": ((3, 4), lambda m, x: F.linear(m.body(x), m.p)),
    "power": ((4,), lambda m, x: m.body(x).abs().add(1) ** m.p),
    "scalar": ((), lambda m, x: m.body(x) * m.p),
    "through its own functions": ((2, 4), lambda m, x: m.body(x) + torch.softmax(m.p, -1).mean(0)),
    "indexed": ((9, 4), lambda m, x: m.body(x) + m.p[2]),
    "looked up": ((9, 4), lambda m, x: m.body(x) + m.p[torch.tensor([1, 2])].sum(0)),
    "repeated": ((1, 4), lambda m, x: torch.cat([m.body(x), m.p.repeat(len(x), 1)], 1)),
    "expanded": ((4,), lambda m, x: torch.cat([m.body(x), m.p.expand(len(x), -1)], 1)),
    "expanded as": ((1, 4), lambda m, x: torch.cat([m.body(x), m.p.expand_as(x)], 1)),
    "through a module": ((1, 4), lambda m, x: m.body(x) + m.body(m.p)),
    "through a module, unbatched": ((4,), lambda m, x: m.body(x) + m.body(m.p).tanh()),
    "split": ((1, 8), lambda m, x: m.body(x) * m.p.chunk(2, 1)[0] + m.p.chunk(2, 1)[1]),
    "twice": ((4,), lambda m, x: (m.body(x) + m.p) * m.p),
    "unused": ((4,), lambda m, x: m.body(x)),
}


def _plus(x, p):
    x += p
    return x


@pytest.mark.parametrize("name", RAW)
def test_raw_parameters_of_a_container_match_the_oracle(name):
    shape, forward = RAW[name]
    model = Net(forward, body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(shape))).double()
    x = double(6, 4)
    expected = expected_direction(model, x)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
    if name == "unused":
        assert model.p.grad is None
        model.p.grad = torch.zeros_like(model.p)
    assert_close(flat_grad(model), expected)


def test_parameter_lists_belong_to_the_module_that_uses_them():
    parts = {"body": nn.Linear(4, 4), "biases": nn.ParameterList([torch.randn(4), torch.randn(1, 4)])}
    model = Net(lambda m, x: m.body(x) * m.biases[0] + m.biases[1], **parts).double()
    assert_exact(model, double(6, 4))


def test_gradient_outside_a_module_is_refused_by_parameter():
    model = Net(lambda m, x: F.linear(m.a(x), m.b.weight), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match=r"parameter 'b\.weight' .* outside the forward of its module"):
        captured_grad(model, torch.randn(6, 4))
    assert all(p.grad is None for p in model.parameters())


class Quantised(torch.autograd.Function):
    """Multiples of `scale`, which torch functions do not see."""

    @staticmethod
    def forward(ctx, x, scale):
        return (x / scale).round() * scale

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.sum()


def test_raw_parameter_that_slips_past_torch_function_is_refused():
    model = Net(lambda m, x: Quantised.apply(m.body(x), m.p), body=nn.Linear(4, 4), p=nn.Parameter(torch.tensor(0.3)))
    with pytest.raises(ValueError, match=r"'p' of module 'Net' .*autograd\.Function.*rgd_ext\.unit"):
        captured_grad(model, torch.randn(6, 4))
    assert all(p.grad is None for p in model.parameters())


READ = {
    "type_as": ((1, 4), lambda m, x: m.body(x) * m.p.type_as(x)),
    "to like the batch": ((), lambda m, x: m.body(x) * m.p.to(x)),
    "value read": ((4,), lambda m, x: m.body(x) * m.p if m.p.sum() > -100 and m.p[0].item() > -100 else x),
}


@pytest.mark.parametrize("name", READ)
def test_values_and_dtypes_of_a_raw_parameter_may_be_read(name):
    shape, forward = READ[name]
    assert_exact(Net(forward, body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(shape))), torch.randn(6, 4))


def test_a_table_looked_up_by_an_input_of_the_model_matches_the_oracle():
    model = Net(lambda m, x, y: m.body(x) + m.p[y], body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(9, 4)))
    assert_exact(model, torch.randn(6, 4), torch.randint(9, (6,)))
