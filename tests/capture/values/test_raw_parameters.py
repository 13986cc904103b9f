"""Raw parameters match the oracle in all that they are used in, and in all that is computed from them."""

import pytest
import torch
import torch.nn.functional as F
from capturing import assert_exact, captured_grad, double, expected_direction, loss_of, parameter
from models import Net
from oracle import assert_close
from planning_cases import reasons, strategies
from torch import nn

import rgd_ext

B, T, N, M = 5, 3, 4, 6


def indices(x):
    return (x.detach().abs() * 3).long() % 2


def mean_of_magnitudes(w):
    with torch.no_grad():
        return w.abs().mean()


def measured_without_gradient(m, x):
    v = m.w * m.w
    with torch.no_grad():
        scale = (x @ m.w).square().sum(-1, True) + (x + v[0, 0]).sum(-1, True) + (x @ v).sum(-1, True)
    return x @ v * scale


def constants(m, x):
    v, u = m.w * m.w, m.a * m.a
    with torch.no_grad():
        y, z, row, _ = x @ m.w, x.maximum(m.a), v[0], x.maximum(u)
    return (x + z).maximum(u) @ v * (y + row)


def changed_in_place(m, x):
    v, u = m.w * 2, m.a * 2
    u.T.add_(1)
    return x @ v.mul_(3) @ u + x @ v @ u


def written_into_zeros(m, x):
    w, v = torch.zeros(N, N, dtype=x.dtype), torch.zeros_like(m.s)
    w[tuple(torch.tril_indices(N, N))] = m.t
    w.diagonal().add_(m.a)
    v[:2] = m.s[1:3]
    return x @ w @ w.T + F.pad(x.maximum(v), (1, 0))[..., 1:]


def changed_after_it_met_the_samples(m, x):
    u, v = m.a * 2, m.w * 2
    y = x + u - v[0]
    u.mul_(3)
    v[0] = 1
    return y * (x + u + v[0] + v[1])


def in_a_transform(m, x):
    return torch.func.vmap(lambda row: row @ m.w + m.b)(x)


# name -> (forward, parameters, shape of the input).
PRODUCTS = {
    "x @ w": (lambda m, x: x @ m.w, {"w": (N, M)}, (N,)),
    "x @ w of sequences": (lambda m, x: x @ m.w, {"w": (N, M)}, (T, N)),
    "x @ w.T": (lambda m, x: x @ m.w.T, {"w": (M, N)}, (T, N)),
    "x @ v": (lambda m, x: x @ m.w, {"w": (N,)}, (T, N)),
    "w @ x": (lambda m, x: m.w @ x, {"w": (M, T)}, (T, N)),
    "x @ w of heads": (lambda m, x: x @ m.w, {"w": (2, N, M)}, (2, T, N)),
    "x @ w of heads, broadcast": (lambda m, x: x[:, None] @ m.w, {"w": (2, N, M)}, (T, N)),
    "matmul by name": (lambda m, x: torch.matmul(input=x, other=m.w), {"w": (N, M)}, (T, N)),
    "linear": (lambda m, x: F.linear(x, m.w, m.b), {"w": (M, N), "b": (M,)}, (N,)),
    "linear of sequences": (lambda m, x: F.linear(x, m.w, m.b), {"w": (M, N), "b": (M,)}, (T, N)),
    "linear of grids": (lambda m, x: F.linear(x, m.w, m.b), {"w": (M, N), "b": (M,)}, (2, T, N)),
    "linear by a vector": (lambda m, x: F.linear(x, m.w), {"w": (N,)}, (T, N)),
    "linear of a transpose": (lambda m, x: F.linear(x, m.w.t(), m.b), {"w": (N, M), "b": (M,)}, (T, N)),
    "linear of a matrix of ones": (lambda m, x: F.linear(x, m.w), {"w": (1, N)}, (T, N)),
    "linear, frozen bias": (lambda m, x: F.linear(x, m.w, m.c), {"w": (M, N), "c": None}, (N,)),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), {"w": (N, M), "b": (M,)}, (N,)),
    "addmm of merged samples": (
        lambda m, x: torch.addmm(m.b, x.reshape(-1, N), m.w).view(*x.shape[:-1], M),
        {"w": (N, M), "b": (M,)},
        (T, N),
    ),
    "addmm with alpha": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), {"w": (N, M), "b": (M,)}, (N,)),
    "einsum": (lambda m, x: torch.einsum("bi,ij->bj", x, m.w), {"w": (N, M)}, (N,)),
    "einsum with dots": (lambda m, x: torch.einsum("...i,oi->...o", x, m.w), {"w": (M, N)}, (T, N)),
    "einsum, the value first": (lambda m, x: torch.einsum("ij, bti -> bjt", m.w, x), {"w": (N, M)}, (T, N)),
    "einsum over two": (lambda m, x: torch.einsum("bti,tio->bo", x, m.w), {"w": (T, N, M)}, (T, N)),
    "einsum over two, apart": (lambda m, x: torch.einsum("bti,toi->bo", x, m.w), {"w": (T, M, N)}, (T, N)),
    "x @ w of one head": (lambda m, x: x @ m.w, {"w": (1, N, M)}, (2, T, N)),
    "addmm, the value first": (lambda m, x: torch.addmm(m.b, m.w, x.T).T, {"w": (M, N), "b": (1,)}, (N,)),
    "einsum that broadcasts x": (
        lambda m, x: torch.einsum("bti,ij->btj", x.sum(-1, keepdim=True), m.w),
        {"w": (N, M)},
        (T, N),
    ),
    "einsum to another order": (lambda m, x: torch.einsum("bti,ij->tbj", x, m.w)[0], {"w": (N, M)}, (T, N)),
    "conv1d of a transpose": (lambda m, x: F.conv1d(x, m.w.transpose(0, 1)), {"w": (N, M, 3)}, (N, 7)),
    "conv1d of frames": (
        lambda m, x: F.conv1d(x.flatten(0, 1), m.w).view(*x.shape[:2], M, 5),
        {"w": (M, N, 3)},
        (T, N, 7),
    ),
    "einsum of heads": (lambda m, x: torch.einsum("bthd,hde->bthe", x, m.w), {"w": (2, N, M)}, (T, 2, N)),
    "einsum that broadcasts": (lambda m, x: torch.einsum("bti,ti->bt", x, m.w), {"w": (1, N)}, (T, N)),
    "einsum, a sum of x": (lambda m, x: torch.einsum("bti,ij->bj", x, m.w), {"w": (N, M)}, (T, N)),
    "einsum, a sum of w": (lambda m, x: torch.einsum("bti,ij->bt", x, m.w), {"w": (N, M)}, (T, N)),
    "conv1d": (lambda m, x: F.conv1d(x, m.w, m.b, 2, 1), {"w": (M, N, 3), "b": (M,)}, (N, 7)),
    "conv2d": (lambda m, x: F.conv2d(x, m.w, padding=(1, 0)), {"w": (M, N, 3, 2)}, (N, 5, 4)),
    "conv2d with groups": (lambda m, x: F.conv2d(x, m.w, m.b, groups=2), {"w": (M, 2, 3, 3), "b": (M,)}, (N, 5, 5)),
    "conv2d, same": (lambda m, x: F.conv2d(x, m.w, padding="same"), {"w": (M, N, 3, 3)}, (N, 4, 4)),
    "conv3d": (lambda m, x: F.conv3d(x, m.w, m.b), {"w": (2, 2, 2, 1, 2), "b": (2,)}, (2, 3, 2, 3)),
    "conv_transpose1d": (lambda m, x: F.conv_transpose1d(x, m.w, m.b, 2), {"w": (N, M, 3), "b": (M,)}, (N, 5)),
    "conv_transpose2d": (lambda m, x: F.conv_transpose2d(x, m.w, None, 2, 1, 1), {"w": (N, M, 3, 3)}, (N, 3, 3)),
    "scale and shift": (lambda m, x: x * m.w + m.b, {"w": (N,), "b": (N,)}, (T, N)),
    "shift and scale": (lambda m, x: m.w * (x - m.b), {"w": (), "b": (1, 1, N)}, (T, N)),
    "scale per channel": (lambda m, x: x * m.w - m.b, {"w": (N, 1, 1), "b": (N, 1, 1)}, (N, 3, 2)),
    "scale that x is broadcast to": (lambda m, x: x.mean(2, keepdim=True) * m.w, {"w": (N,)}, (T, N)),
    "embedding": (lambda m, x: x[..., None] * F.embedding(indices(x), m.w), {"w": (9, M)}, (T, N)),
    "embedding with padding": (lambda m, x: x[..., None] * F.embedding(indices(x), m.w, -1), {"w": (2, M)}, (T, N)),
    "embedding of one row": (lambda m, x: x[:, 0, :1] * F.embedding(indices(x)[:, 0, 0], m.w), {"w": (9, M)}, (T, N)),
    "rows of a table": (lambda m, x: x[..., None] * m.w[indices(x) - 9], {"w": (9, M)}, (T, N)),
    "rows of a table of matrices": (lambda m, x: x[..., None, None] * m.w[indices(x)], {"w": (9, 2, M)}, (T, N)),
    "difference": (lambda m, x: m.b - x, {"b": (N,)}, (T, N)),
    "sum with alpha": (lambda m, x: torch.add(x, m.b, alpha=3), {"b": (N,)}, (T, N)),
}


COMPUTED = {
    "times a number": (lambda m, x: F.linear(x, m.w * 2, m.b), {"w": (M, N), "b": (M,)}, (T, N)),
    "times a number, of one vector": (lambda m, x: F.linear(x, m.w * 2, m.b), {"w": (M, N), "b": (M,)}, (N,)),
    "a number times": (lambda m, x: x @ (0.5 * -m.w.T / 3), {"w": (M, N)}, (N,)),
    "number over": (lambda m, x: x @ (1 / (m.w + 3)), {"w": (N, M)}, (N,)),
    "times a number from a buffer": (lambda m, x: x @ (m.w * m.c[0]), {"w": (N, M), "c": None}, (N,)),
    "times a parameter": (lambda m, x: x @ (m.w * m.s), {"w": (N, M), "s": ()}, (N,)),
    "times itself": (lambda m, x: x @ (m.w * m.w), {"w": (N, M)}, (N,)),
    "masked": (lambda m, x: x @ (m.w * m.w.detach().sign()), {"w": (N, M)}, (T, N)),
    "blocks of rows": (
        lambda m, x: torch.cat([F.linear(x, w) for w in m.w.chunk(3)], -1) * (x @ m.w[1:5].T).sum(-1, True),
        {"w": (9, N)},
        (T, N),
    ),
    "blocks of rows, of one vector": (lambda m, x: F.linear(x, m.w[1:3]) @ m.w[:2, :1], {"w": (9, N)}, (N,)),
    "blocks of rows on the right": (lambda m, x: x @ m.w[2 : 2 + N] @ m.w.T[:M], {"w": (9, M)}, (T, N)),
    "blocks of elements": (lambda m, x: x @ m.w.view(-1)[1 : 1 + N * 2].view(N, 2), {"w": (9, N)}, (T, N)),
    "scaled blocks": (lambda m, x: F.linear(x, (m.w * 2)[1:3]) + F.linear(x, m.w[1:3] * 3), {"w": (9, N)}, (T, N)),
    "part": (lambda m, x: x @ m.w[:, 1:4], {"w": (N, M)}, (T, N)),
    "flipped": (lambda m, x: x @ m.w.flip(0), {"w": (N, M)}, (N,)),
    "rows of a scaled table": (lambda m, x: x[..., None] * F.embedding(indices(x), m.w * 2), {"w": (9, M)}, (T, N)),
    "viewed": (lambda m, x: x @ m.w.view(N, M), {"w": (2, 2 * M)}, (T, N)),
    "viewed, without places": (lambda m, x: F.linear(x, m.w[:, :, 0, 0], m.b), {"w": (M, N, 1, 1), "b": (M,)}, (N,)),
    "viewed as kernels": (lambda m, x: F.conv2d(x, m.w.view(M, N, 3, 3)), {"w": (M, 9 * N)}, (N, 5, 5)),
    "kernels of one place": (lambda m, x: F.conv1d(x, m.w[..., None]), {"w": (M, N)}, (N, 7)),
    "kernels and a matrix": (
        lambda m, x: F.conv1d(x, m.w[..., None]) + F.linear(x.mT, m.w).mT,
        {"w": (M, N)},
        (N, 7),
    ),
    "rows of a viewed table": (lambda m, x: x[..., None] * m.w.view(9, M)[indices(x)], {"w": (9, 2, 3)}, (T, N)),
    "bias of one number": (lambda m, x: F.linear(x, m.w, m.b), {"w": (M, N), "b": (1,)}, (N,)),
    "bias that is a weight too": (
        lambda m, x: F.linear(x, m.b[None], m.b[:1]) + F.linear(x, m.w, m.b),
        {"w": (N, N), "b": (N,)},
        (N,),
    ),
    "viewed, of one vector": (lambda m, x: x @ m.w.view(N, M), {"w": (2, 2 * M)}, (N,)),
    "viewed the other way": (lambda m, x: F.linear(x, m.w.view(M, N)), {"w": (2, 3, N)}, (T, N)),
    "permuted": (lambda m, x: x @ m.w.permute(1, 0, 2).reshape(N, -1), {"w": (2, N, 3)}, (T, N)),
    "expanded": (lambda m, x: x @ m.w.expand(N, M), {"w": (1, M)}, (T, N)),
    "softmax": (lambda m, x: x @ m.w.softmax(0), {"w": (N, M)}, (T, N)),
    "product of two": (lambda m, x: x @ (m.w + m.a @ m.b), {"w": (N, M), "a": (N, 2), "b": (2, M)}, (T, N)),
    "low rank": (lambda m, x: x @ m.a @ m.b, {"a": (N, 2), "b": (2, M)}, (T, N)),
    "used twice": (lambda m, x: (x @ m.w).tanh() @ m.w.T, {"w": (N, M)}, (T, N)),
    "used in three ways": (lambda m, x: (x @ m.w + m.w[0]) * m.w.sum(), {"w": (N, M)}, (T, N)),
    "standardised": (
        lambda m, x: F.conv2d(x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True), m.b * 2),
        {"w": (M, N, 3, 3), "b": (M,)},
        (N, 5, 5),
    ),
    "scaled by its magnitude": (lambda m, x: x @ m.w / mean_of_magnitudes(m.w), {"w": (N, M)}, (T, N)),
    "written into zeros": (written_into_zeros, {"t": (10,), "a": (N,), "s": (N,)}, (T, N)),
    "changed after it met the samples": (changed_after_it_met_the_samples, {"w": (2, N), "a": (N,)}, (T, N)),
    "constants": (constants, {"w": (N, M), "a": (N,)}, (T, N)),
    "in a transform": (in_a_transform, {"w": (N, M), "b": (M,)}, (T, N)),
    "number over by name": (lambda m, x: x @ torch.div(1, m.w), {"w": (N, M)}, (N,)),
    "overlapping": (lambda m, x: x @ m.w.as_strided((N, M), (1, 1)), {"w": (N, M)}, (T, N)),
    "rounded quotient": (lambda m, x: x @ (m.w + torch.div(m.w, 0.1, rounding_mode="floor")), {"w": (N, M)}, (N,)),
    "measured without gradient": (measured_without_gradient, {"w": (N, M)}, (T, N)),
    "changed in place": (changed_in_place, {"w": (N, M), "a": (M, 2)}, (T, N)),
    "value read": (lambda m, x: x @ m.w * (1 if m.w[0, 0].item() > 9 else 2), {"w": (N, M)}, (T, N)),
}


CASES = PRODUCTS | COMPUTED


def model_of(name, is_container):
    forward, shapes, shape = CASES[name]
    parts = {key: double(M) if sizes is None else parameter(*sizes) for key, sizes in shapes.items()}
    if is_container:
        parts["body"] = nn.Linear(shape[-1], shape[-1]).double()
        model = Net(lambda m, x: forward(m, m.body(x)), **parts)
    else:
        model = Net(forward, **parts)
    return model, double(B, *shape)


# A container looks at all samples together: it refuses what merges them, and numbers that may not be samples.
REFUSED = {"addmm of merged samples", "embedding of one row", "addmm, the value first", "conv1d of frames"}


REFUSED |= {"einsum to another order", "in a transform", "written into zeros"}


@pytest.mark.parametrize("is_container", [False, True], ids=["unit", "container"])
@pytest.mark.parametrize("name", CASES)
def test_raw_parameters_match_the_oracle(name, is_container):
    model, x = model_of(name, is_container)
    if is_container and name in REFUSED:
        with pytest.raises(ValueError, match=r"rgd_ext\.unit"):
            captured_grad(model, x)
    else:
        assert_exact(model, x)


@pytest.mark.parametrize("name", ["x @ w", "x @ v", "einsum over two", "times a number", "product of two", "conv1d"])
def test_alignments_of_raw_parameters_match_the_oracle(name):
    assert_exact(*model_of(name, False), policy="Rayleigh")


LAYERS = ["x @ w", "x @ w.T", "linear", "linear, frozen bias", "addmm", "einsum", "a number times", "low rank"]


@pytest.mark.parametrize("is_container", [False, True], ids=["unit", "container"])
@pytest.mark.parametrize("name", LAYERS)
def test_products_with_one_vector_per_sample_form_no_gradients(name, is_container):
    model, _ = model_of(name, is_container)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(double(B, N))).backward()
        assert "materialise" not in strategies(handle).values()


def test_convolutions_of_raw_parameters_have_the_strategies_of_layers():
    model = Net(lambda m, x: F.conv2d(x, m.w), w=nn.Parameter(torch.randn(64, 64, 3, 3) / 20))
    with rgd_ext.precondition(model) as handle:
        loss_of(model(torch.randn(32, 64, 8, 8))).backward()
        (reason,) = reasons(handle).values()
    assert "ghost" in reason


@pytest.mark.parametrize("is_container", [False, True], ids=["unit", "container"])
@pytest.mark.parametrize("name", ["x @ w", "linear of sequences", "times a number", "masked", "conv2d"])
def test_raw_parameters_under_autocast_keep_the_direction(name, is_container):
    model, x = model_of(name, is_container)
    model, x = model.float(), x.float()
    expected = expected_direction(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = captured_grad(model, x)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_parameters_that_are_not_contiguous_match_the_oracle():
    model, x = Net(lambda m, x: x @ m.w, w=nn.Parameter(double(M, N).T)), double(B, N)
    assert_exact(model, x)
    model, x = Net(lambda m, x: F.conv2d(x, m.w), w=parameter(M, N, 3, 3)), double(B, N, 5, 5)
    assert_exact(model.to(memory_format=torch.channels_last), x)


def test_shared_values_as_large_as_the_batch_are_refused_before_the_backward():
    model = Net(lambda m, x: m.out(x + m.p), out=nn.Linear(N, M), p=nn.Parameter(torch.randn(B, N)))
    with rgd_ext.precondition(model, verify=False), pytest.raises(ValueError, match="mixes samples"):
        model(torch.randn(B, N))


def test_an_embedding_that_changes_its_table_is_refused():
    for others in ({}, {"out": nn.Linear(N, M)}):
        model = Net(lambda m, x: F.embedding(x, m.w, max_norm=0.1), w=nn.Parameter(torch.randn(9, N)), **others)
        before = model.w.detach().clone()
        with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"max_norm changes|depends on its input"):
            model(torch.randint(9, (B, T)))
        assert torch.equal(model.w, before)


def test_gradients_of_what_is_no_parameter_of_the_model_are_ordinary():
    other, x = parameter(N, M), double(B, N)
    model = Net(lambda m, x: x @ (m.w * other) + (other.T @ m.w).sum(), w=parameter(N, M))
    (expected,) = torch.autograd.grad(loss_of(model(x)), other)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
    assert_close(other.grad, expected)


def test_embeddings_that_count_over_the_batch_are_refused():
    model = Net(lambda m, x: F.embedding(x, m.w, scale_grad_by_freq=True), w=parameter(9, N))
    with rgd_ext.precondition(model, verify=False), pytest.raises(ValueError, match=r"use nn\.Embedding"):
        model(torch.randint(9, (B, T)))


@pytest.mark.parametrize("others", [{}, {"body": nn.Linear(N, N)}], ids=["unit", "container"])
def test_an_empty_batch_is_refused(others):
    model = Net(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(N, M)), **others)
    with rgd_ext.precondition(model), pytest.raises(ValueError, match="empty batch"):
        model(torch.randn(0, N))


def test_buffers_computed_from_parameters_are_ordinary():
    def forward(m, x):
        m.mean = m.mean * 0.9 + m.w.detach().mean() * 0.1
        return m.body(x) @ m.w

    model, x = Net(forward, body=nn.Linear(N, N), w=parameter(N, M), mean=torch.zeros(1)).double(), double(B, N)
    with rgd_ext.precondition(model):
        model(x)
    assert type(model.mean) is torch.Tensor
    model(x)


def test_a_detached_parameter_that_is_turned_on_again_is_another_leaf():
    model, x = Net(lambda m, x: m.a(x) @ m.w.detach().requires_grad_() + m.a(x) @ m.w, a=nn.Linear(N, N)), double(B, N)
    model.w = parameter(N, M)
    model = model.double()
    expected = torch.autograd.grad(loss_of(model(x)), model.w)[0]
    with rgd_ext.precondition(model, epsilon=0.0):
        loss_of(model(x)).backward()
    assert_close(model.w.grad, expected)
