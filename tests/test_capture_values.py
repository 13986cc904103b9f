"""Values that all samples share on their way from parameters to the batch: functions, parametrisations, units."""

import pytest
import torch
import torch.nn.functional as F
from capturing import B, captured_grad, double, loss_of
from models import Net
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Product(torch.autograd.Function):
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


def test_parametrisations_that_are_cached():
    def forward(m, x):
        with nn.utils.parametrize.cached():
            return m.head(m.body(m.body(x)))

    body = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
    model, x = Net(forward, body=body, head=nn.Linear(5, 2)).double(), double(B, 5)
    expected = weak_field(per_sample_gradients(model, loss_of, [x]))
    with rgd_ext.precondition(model):
        for _ in range(2):
            model.zero_grad()
            loss_of(model(x)).backward()
            assert_close(flat_grad(model), expected)
        model.zero_grad()
        with nn.utils.parametrize.cached():
            loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected)


def test_what_a_capture_computes_is_cached_for_nobody_else():
    body = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
    model, x = nn.Sequential(body, nn.Tanh()), torch.randn(B, 5)
    expected = model(x)
    with rgd_ext.precondition(model) as handle, nn.utils.parametrize.cached():
        loss_of(model(x)).backward()
        with handle.paused():
            assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.* is slow")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs(layout):
    x = F.one_hot(torch.randint(5, (B,)), 5).double()
    raw = Net(lambda m, x: m.b(torch.sparse.mm(x, m.w).tanh()), w=nn.Parameter(double(5, 4)), b=nn.Linear(4, 3))
    for model in (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), raw):
        model = model.double()
        expected = weak_field(per_sample_gradients(model, loss_of, [x]))
        assert_close(captured_grad(model, x.to_sparse(layout=layout)), expected)


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("padding", [0, -1])
def test_padding_of_an_embedding_in_a_unit_gets_no_gradient(padding):
    model, x = nn.Sequential(Scaled(10, 4, padding_idx=padding), nn.Linear(4, 3)).double(), torch.randint(10, (B, 4))
    x[:, 1] = padding % 10
    assert_close(captured_grad(model, x), weak_field(per_sample_gradients(model, loss_of, [x])))


def test_a_unit_that_gives_one_value_for_all():
    class Positions(nn.Embedding):
        def forward(self, ids, positions):
            return super().forward(positions[None])

    def forward(m, ids):
        return m.head(m.tokens(ids) + m.positions(ids, positions=torch.arange(ids.shape[1])))

    model = Net(forward, tokens=nn.Embedding(9, 4), positions=Positions(9, 4), head=nn.Linear(4, 3)).double()
    x = torch.randint(9, (5, 7))
    assert_close(captured_grad(model, x), weak_field(per_sample_gradients(model, loss_of, [x])))
