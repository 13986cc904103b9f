"""The capture proves itself: it finds wrong per-sample gradients without knowing their kinds, and leaves no trace."""

import copy
import random
import re
import warnings
from dataclasses import dataclass
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from capturing import captured_grad, double, loss_of
from models import MODELS, Net, mlp
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from torch import nn
from torch.utils.checkpoint import checkpoint

import rgd_ext

B = 6


def own_type(forward, **parts):
    """A `Net` of a type of its own, for `register_rule`."""
    return type("Own", (Net,), {})(forward, **parts)


def as_unit(model):
    rgd_ext.register_rule(type(model), rgd_ext.unit)


# Samples that a forward mixes: nothing makes their gradients separate


def less_the_mean(m, x):
    z = m.a(x).tanh()
    return m.b(z - z.mean(0))


def normalised_by_the_batch(m, x):
    return m.b(F.batch_norm(m.a(x), None, None, training=True))


def attention_between_rows(m, x):
    z = m.a(x)
    return m.b((z @ z.T).softmax(-1) @ z)


def mixup(m, x):
    z, share = m.a(x).tanh(), torch.rand(())
    return m.b((share * z + (1 - share) * z[torch.randperm(len(z))]).sin())


def minibatch_deviation(m, x):
    z = m.a(x).tanh()
    return m.b(z * z.std(0).mean())


def expert_choice(m, x):
    scores, out = m.b(x).softmax(1), 0
    for expert in range(2):
        weight, chosen = scores[:, expert].topk(len(x))  # each takes as many as there are
        out = out + torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, chosen, weight[:, None] * m.a(x[chosen]))
    return out


MIXING = [less_the_mean, normalised_by_the_batch, attention_between_rows, mixup, minibatch_deviation]


@pytest.mark.parametrize("forward", [*MIXING, expert_choice], ids=lambda forward: forward.__name__)
def test_forwards_that_mix_samples_are_refused(forward):
    model = Net(forward, a=nn.Linear(5, 4), b=nn.Linear(5 if forward is expert_choice else 4, 2))
    message = r"parameter '(a|b)\.(weight|bias)' of module '(a|b)' \(Linear\).*relative error.*verify=False"
    with rgd_ext.precondition(model) as handle:
        with pytest.raises(ValueError, match=message):
            model(torch.randn(B, 5))
        assert handle.stats is None
    assert all(p.grad is None for p in model.parameters())
    with rgd_ext.precondition(model, verify=False) as handle:
        loss_of(model(torch.randn(B, 5))).backward()
    assert handle.stats is not None


def test_messages_between_the_nodes_of_a_graph_are_refused():
    # A node alone fits no adjacency: the others become copies of it.
    model = Net(lambda m, x, links: m.b((links @ m.a(x)).relu()), a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    links = (torch.rand(B, B) < 0.4).float() + torch.eye(B)
    for adjacency in (links, links.to_sparse()):
        with pytest.raises(ValueError, match="the forward mixes samples"):
            rgd_ext.verify(model, torch.randn(B, 5), adjacency)


def test_a_forward_is_told_that_it_mixes():
    with pytest.raises(ValueError, match=r"mixes samples, since the outputs for one change by \d.*convert_batch_norm"):
        rgd_ext.verify(Net(less_the_mean, a=nn.Linear(5, 4), b=nn.Linear(4, 2)), torch.randn(B, 5))


# Sizes that agree by chance, and samples that change places. With the remedy all of them are exact


def positions(m, x, of_table=False):
    t = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
    table = m.table[: x.shape[1]] * 2 if of_table else torch.stack([t, t * t], 1)
    return m.out((m.body(x) + m.positions(table)).tanh()).mean(1)


def layers(**others):
    return {"body": nn.Linear(5, 4), "out": nn.Linear(4, 2), **others}


class Biased(nn.Module):
    """Attention with a bias per head, (heads, T, T), whatever the batch."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x, bias):
        heads = x.unflatten(2, (bias.shape[-3], -1)).transpose(1, 2)
        scores = (heads @ heads.transpose(-1, -2) + bias).softmax(-1)
        return (scores @ heads).transpose(1, 2).flatten(2) * self.gain


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.a, self.o = nn.Linear(3, 4), nn.MultiheadAttention(4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.i(x).transpose(0, 1)
        return self.o(x + self.a(x, x, x)[0]).mean(0)


class WordModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.lstm, self.head = nn.Embedding(9, 4), nn.LSTM(4, 4), nn.Linear(4, 9)

    def forward(self, x):
        return self.head(self.lstm(self.tokens(x).transpose(0, 1))[0]).transpose(0, 1)


def raw_parameter():
    def forward(m, x):
        return m.out((m.body(x) + m.p.expand(x.shape[1], -1)).tanh()).mean(1)

    return own_type(forward, **layers(p=nn.Parameter(torch.randn(1, 4))))


def sorted_and_put_back():
    def forward(m, x):
        order = x[:, 0].argsort()
        return m.out(m.body(x[order]).tanh())[order.argsort()]

    return own_type(forward, **layers())


def shared_input():
    return Net(lambda m, x, keys: m.body(x) @ m.other(keys).T, body=nn.Linear(5, 4), other=nn.Linear(5, 4))


CHANCE = {
    "raw parameter expanded to T": (raw_parameter, [double(B, B, 5)], as_unit),
    "as many shared rows as samples": (
        shared_input,
        [double(B, 5), double(B, 5)],
        lambda m: rgd_ext.mark(m.other, batch_dim=None),
    ),
    "as many heads as samples": (
        lambda: own_type(
            lambda m, x: m.attend(m.body(x), m.table * 1.0),
            body=nn.Linear(5, 4),
            attend=Biased(),
            table=double(2, 3, 3),
        ),
        [double(2, 3, 5)],
        as_unit,
    ),
    "tensor made inside": (
        lambda: Net(positions, **layers(positions=nn.Linear(2, 4))),
        [double(B, B, 5)],
        lambda m: rgd_ext.mark(m.positions, batch_dim=None),
    ),
    "computed from a buffer": (
        lambda: Net(lambda m, x: positions(m, x, True), **layers(positions=nn.Linear(2, 4), table=double(9, 2))),
        [double(B, B, 5)],
        lambda m: rgd_ext.mark(m.positions, batch_dim=None),
    ),
    "attention with time first": (TimeFirst, [double(5, 5, 3)], lambda m: rgd_ext.mark(m.o, batch_dim=1)),
    "attention with time first, as a unit": (TimeFirst, [double(5, 5, 3)], as_unit),
    "LSTM with time first": (WordModel, [torch.randint(9, (5, 5))], lambda m: rgd_ext.mark(m.head, batch_dim=1)),
    "sorted and put back": (sorted_and_put_back, [double(B, 5)], as_unit),
}


@pytest.mark.parametrize("name", CHANCE)
def test_wrong_samples_are_found_and_the_remedy_works(name):
    build, inputs, remedy = CHANCE[name]
    model = build().double()
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"relative error of|other values for a batch"):
        model(*inputs)
    assert all(p.grad is None for p in model.parameters())
    kind = type(model)
    try:
        remedy(model)
        found = captured_grad(model, *inputs)
    finally:
        rgd_ext.capture.rules._registry.pop(kind, None)
    if name == "as many shared rows as samples":
        expected = shared_oracle(model, *inputs)
    else:
        expected = per_sample_gradients(model, loss_of, inputs)
    assert_close(found, weak_field(expected))


def shared_oracle(model, x, keys):
    output = model(x, keys).detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(output), output)
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(model(x[i : i + 1], keys), list(model.parameters()), grad[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in grads]))
    return len(x) * torch.stack(rows)


def test_another_batch_size_is_proven_again():
    model = raw_parameter()
    with rgd_ext.precondition(model):
        model(torch.randn(B, 3, 5))
        with pytest.raises(ValueError, match="relative error"):
            model(torch.randn(3, 3, 5))
        with pytest.raises(ValueError, match="relative error"):
            model(torch.randn(B, B, 5))  # the same batch size, but now of as many places


def test_another_mode_and_what_is_trained_are_proven_again():
    def forward(m, x):
        z = m.a(x).tanh()
        return m.b(z - z.mean(0) if m.training else z)

    model = Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 2)).eval()
    with rgd_ext.precondition(model):
        model(torch.randn(B, 5))
        model.train()
        with pytest.raises(ValueError, match="mixes samples"):
            model(torch.randn(B, 5))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model(torch.randn(B, 5, requires_grad=True))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        with pytest.raises(ValueError, match="mixes samples"):
            model(torch.randn(B, 5))


def test_parts_called_from_outside_are_proven_themselves():
    model = nn.ModuleDict({"part": Net(less_the_mean, a=nn.Linear(5, 4), b=nn.Linear(4, 2))})
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"parameter '(a|b)\..*mixes samples"):
        model["part"](torch.randn(B, 5))


def test_positions_in_another_method_than_forward():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 3)

        def features(self, x):
            return self.head((self.tokens(x) + self.positions(torch.arange(x.shape[1]))).tanh())

        def forward(self, x):
            return self.features(x)

    model, x = Features().double(), torch.randint(9, (4, 5))
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"'positions'.*'tokens'.*into the forward"):
        model.features(x[:, :4])
    # What the message asks for is there already.
    assert_close(captured_grad(model, x), weak_field(per_sample_gradients(model, loss_of, [x])))


def test_functions_without_positions_are_no_positions():
    model = nn.ModuleDict({"label": nn.Embedding(9, 4), "body": nn.Linear(6, 4)}).double()
    x, y = double(6, 6), torch.tensor([0, 1, 2, 3, 4, 4])
    with rgd_ext.precondition(model) as handle:
        loss_of(model["body"](x) * model["label"](y)).backward()
    assert handle.stats.batch_size == 6


# Parameters that reach the outputs past the capture


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


@pytest.mark.filterwarnings("ignore:There is a performance drop")
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


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_a_capture_computes_is_cached_for_nobody_else():
    body = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
    model, x = nn.Sequential(body, nn.Tanh()), torch.randn(B, 5)
    expected = model(x)
    with rgd_ext.precondition(model) as handle, nn.utils.parametrize.cached():
        loss_of(model(x)).backward()
        with handle.paused():
            assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:There is a performance drop")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs(layout):
    x = F.one_hot(torch.randint(5, (B,)), 5).double()
    raw = Net(lambda m, x: m.b(torch.sparse.mm(x, m.w).tanh()), w=nn.Parameter(double(5, 4)), b=nn.Linear(4, 3))
    for model in (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), raw):
        model = model.double()
        expected = weak_field(per_sample_gradients(model, loss_of, [x]))
        assert_close(captured_grad(model, x.to_sparse(layout=layout)), expected)


def test_single_samples_and_one_backward_name_accumulate():
    model = mlp()
    with rgd_ext.precondition(model) as handle:
        with pytest.warns(UserWarning, match=r"one sample each.*handle\.accumulate\(\)"):
            sum(loss_of(model(torch.randn(1, 6))) for _ in range(3)).backward()
        sum(loss_of(model(torch.randn(1, 6))) for _ in range(3)).backward()  # says it once
        with handle.accumulate():
            for _ in range(3):
                loss_of(model(torch.randn(1, 6))).backward()
        assert handle.stats.batch_size == 3


def test_samples_in_the_midst_that_change_places():
    order = torch.tensor([0, 2, 1, 4, 3, 5])
    model = Net(lambda m, x: m.b(m.a(x)[order].tanh())[order], a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"do not follow their own samples.*the capture credits"):
        rgd_ext.verify(model, torch.randn(B, 5))


def test_a_loss_of_mixed_samples_beside_outputs_of_their_own():
    def forward(m, x):
        h = m.a(x).tanh()
        return {"loss": m.b(h - h.mean(0)).square().mean(), "logits": m.b(h)}

    assert (
        "no weighted sum" in rgd_ext.verify(Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 2)), torch.randn(B, 5)).note
    )
    # A loss of the outputs alone is like one outside of the model.
    contrast = Net(lambda m, x: (z := m.a(x), F.cross_entropy(z @ z.T, torch.arange(B))), a=nn.Linear(5, 4))
    assert not rgd_ext.verify(contrast, torch.randn(B, 5)).note


def test_a_loss_beside_outputs_that_lie_on_the_way_to_others():
    def forward(m, x, y):
        h = m.a(x).tanh()
        z = m.b(h)
        return F.cross_entropy(z, y), z, h

    model = Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    verification = rgd_ext.verify(model, torch.randn(B, 5), torch.tensor([0, 1, 2, 0, 2, 1]))
    assert (verification.samples, verification.note) == ((0, 5), "")
    assert verification.largest_error < 1e-5


def test_products_between_all_samples_are_left_out():
    def forward(m, x, y):
        left, right = m.a(x), m.b(y)
        return left, right, left @ right.T

    verification = rgd_ext.verify(
        Net(forward, a=nn.Linear(5, 4), b=nn.Linear(3, 4)), double(B, 5).float(), double(B, 3).float()
    )
    assert verification.samples
    assert "left out" in verification.note


def test_what_is_no_tensor_is_part_of_the_kind():
    def forward(m, x, mix):
        return m.b(m.a(x).flip(0)).flip(0) if mix else m.b(m.a(x))

    model, x = Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 2)), torch.randn(B, 5)
    with rgd_ext.precondition(model):
        model(x, False)
        with pytest.raises(ValueError, match="relative error"):
            model(x, True)


def test_a_mode_of_a_module_inside_is_part_of_the_kind():
    inner = Net(lambda m, x: F.batch_norm(x, None, None, training=True) if m.training else x).eval()
    model, x = Net(lambda m, x: m.inner(m.a(x)), a=nn.Linear(5, 4), inner=inner), torch.randn(B, 5)
    with rgd_ext.precondition(model):
        model(x)
        inner.train()
        with pytest.raises(ValueError, match="mixes samples"):
            model(x)


def test_weights_behind_zeros_are_proven_when_they_are_none():
    def forward(m, x):
        return m.a(x) + m.gate * m.b(m.a(x).flip(0)).flip(0)

    model = Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 4), gate=nn.Parameter(torch.zeros(4)))
    optimizer = rgd_ext.RGD(model, lr=0.1)
    with pytest.raises(ValueError, match=r"parameter '\w\.\w+'.*relative error"):  # noqa: PT012
        for _ in range(3):
            loss_of(model(torch.randn(B, 5))).backward()
            optimizer.step()


def test_batch_normalisation_hides_no_other_fault():
    model = Net(
        lambda m, x: m.b(m.norm(m.a(x)).flip(0)).flip(0), a=nn.Linear(5, 4), norm=nn.BatchNorm1d(4), b=nn.Linear(4, 2)
    )
    with rgd_ext.precondition(model, batch_norm="contribution"):
        with pytest.raises(ValueError, match="the capture credits"):
            model(torch.randn(B, 5))
        assert model.norm.num_batches_tracked == 0


# Right models are proven


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


def test_complex_outputs_and_masked_logits():
    model = Net(lambda m, x: torch.fft.rfft(m.b(m.a(x))), a=nn.Linear(5, 4), b=nn.Linear(4, 4))
    assert rgd_ext.verify(model, torch.randn(B, 5)).samples
    model._forward = lambda m, x: torch.fft.rfft(m.b(m.a(x).flip(0))).flip(0)
    with pytest.raises(ValueError, match="the capture credits"):
        rgd_ext.verify(model, torch.randn(B, 5))
    mask = torch.tensor([0, -torch.inf, 0, 0])
    model._forward = lambda m, x: m.b(m.a(x)) + mask
    assert rgd_ext.verify(model, torch.randn(B, 5)).samples


def test_rounding_is_no_error():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 4)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            assert rgd_ext.verify(encoder, torch.randn(7, 5, 32)).samples

    def low_inside(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.encoder(x).float()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*too much rounding")
        captured_grad(Net(low_inside, encoder=encoder), torch.randn(7, 5, 32))


def test_a_chaotic_recurrence_is_no_error():
    model, x = nn.RNN(8, 16, batch_first=True), torch.randn(5, 200, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6
    model = Net(lambda m, x: m.layer(x)[0][:, -1], layer=model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*too much rounding")
        assert captured_grad(model, x).isfinite().all()


def test_random_numbers_of_numpy_per_sample():
    def forward(m, x):
        return m.b(1 + 1e-3 * m.a(x * torch.tensor(numpy.random.rand(*x.shape) > 0.3)))

    for seed in range(5):
        numpy.random.seed(seed)
        assert rgd_ext.verify(Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 2)), torch.randn(B, 5)).samples


def noise(m, x):
    z = m.a(x)
    z = z + torch.randn_like(z) * torch.rand(len(z), 1) + torch.distributions.Exponential(1.0).sample((len(z), 1))
    z = z * torch.bernoulli(torch.full((len(z), 1), 0.8)) + torch.normal(z.detach(), 1.0)
    return m.b(F.gumbel_softmax(F.alpha_dropout(F.dropout(z, 0.2), 0.2), dim=-1))


def own_generator(m, x):
    return m.b(m.a(x) * torch.rand(len(x), 4, generator=m.generator))


def timesteps(m, x):
    return m.b(m.a(x) * (1 + torch.randint(10, (len(x), 1))) + torch.multinomial(m.a(x).softmax(-1), 2)[:, :1])


@pytest.mark.parametrize("forward", [noise, own_generator, timesteps], ids=lambda forward: forward.__name__)
def test_random_forwards_are_proven(forward):
    model = Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    model.generator = torch.Generator().manual_seed(0)
    verification = rgd_ext.verify(model, torch.randn(B, 5))
    assert verification.samples == (0, B - 1)
    assert not verification.note


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU])
def test_random_layers_are_proven(kind):
    verification = rgd_ext.verify(nn.Sequential(nn.Conv1d(2, 4, 3), kind(), nn.Conv1d(4, 2, 3)), torch.randn(B, 2, 9))
    assert verification.samples
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    assert rgd_ext.verify(encoder, torch.randn(B, 3, 4)).samples


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


OUTPUTS = {
    "tuple": lambda z, y: (z, z.square()),
    "mapping": lambda z, y: {"logits": z, "number": 3, "labels": y},
    "dataclass with a loss": lambda z, y: Output(F.cross_entropy(z, y), z),
    "no dimension for one sample": lambda z, y: z.sum(1).squeeze(),
    "merged with places": lambda z, y: z.flatten()[:, None],
    "places first": lambda z, y: z.T.flatten(),
    "samples last": lambda z, y: z.T,
    "mean loss": F.cross_entropy,
    "sum loss": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "weighted loss": lambda z, y: F.cross_entropy(z, y, ignore_index=2),
    "two losses": lambda z, y: (F.cross_entropy(z, y), z.square().sum()),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_all_kinds_tell_samples_apart(name):
    model = Net(lambda m, x, y: OUTPUTS[name](m.b(m.a(x).tanh()), y), a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    y = torch.tensor([0, 1, 2, 0, 2, 1])
    verification = rgd_ext.verify(model, torch.randn(B, 5), y)
    assert verification.samples == (0, B - 1)
    assert verification.largest_error < 1e-5


def test_a_loss_inside_the_model_does_not_hide_wrong_samples():
    model = Net(lambda m, x, y: F.mse_loss(m.inner(x), y, reduction="sum"), inner=raw_parameter())
    assert rgd_ext.verify(model, torch.randn(B, 3, 5), torch.randn(B, 2)).samples
    with pytest.raises(ValueError, match=r"'inner\.p'.*relative error"):
        rgd_ext.verify(model, torch.randn(B, B, 5), torch.randn(B, 2))


def test_parameters_that_only_the_loss_depends_on():
    def forward(m, x, y):
        return m.a(x), F.mse_loss(m.inner(x), y)

    model = Net(forward, a=nn.Linear(5, 4), inner=raw_parameter())
    assert rgd_ext.verify(model, torch.randn(B, 3, 5), torch.randn(B, 2)).samples
    with pytest.raises(ValueError, match=r"'inner\.p'.*relative error"):
        rgd_ext.verify(model, torch.randn(B, B, 5), torch.randn(B, 2))


def test_a_contrastive_loss_of_the_model_is_summed_and_said_once():
    def forward(m, x):
        z = m.a(x)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    model = Net(forward, a=nn.Linear(5, 4))
    with rgd_ext.precondition(model):
        with pytest.warns(UserWarning, match="no weighted sum"):
            model(torch.randn(B, 5))
        model(torch.randn(B + 1, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_whole_models_in_every_precision(dtype):
    for name, (build, inputs_of) in MODELS.items():
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs_of(5)]
        assert rgd_ext.verify(build().to(dtype), *inputs).samples, name


def test_autocast_and_checkpoints():
    model, x = (
        Net(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=mlp(), b=nn.Linear(3, 2)),
        torch.randn(B, 6),
    )
    with rgd_ext.precondition(model) as handle:
        with torch.autocast("cpu"), warnings.catch_warnings():
            warnings.simplefilter("error")
            loss_of(model(x)).backward()
        loss_of(checkpoint(model, x, use_reentrant=False)).backward()
        assert handle.stats.batch_size == B
    with rgd_ext.precondition(mlp()) as handle:
        loss_of(checkpoint(handle.model, x, use_reentrant=False)).backward()  # verified inside
        assert handle.stats.batch_size == B


def test_a_model_that_needs_autocast():
    model, x = mlp(), torch.randn(B, 6).bfloat16()
    with rgd_ext.precondition(model) as handle, torch.autocast("cpu", torch.bfloat16):
        assert rgd_ext.verify(model, x).tolerance > 0.01
        loss_of(model(x)).backward()
        loss_of(model(x)).backward()
    assert handle.stats.batch_size == B


def test_several_calls_before_a_backward_and_accumulate():
    model, parts = mlp().double(), [double(B, 6), double(4, 6)]
    with rgd_ext.precondition(model) as handle, handle.accumulate():
        for x in parts:
            (len(x) * loss_of(model(x))).backward()
    union = torch.cat([per_sample_gradients(model, loss_of, [x]) * 10 for x in parts])
    assert_close(flat_grad(model), weak_field(union))
    model.zero_grad()
    with rgd_ext.precondition(model):
        (model(parts[0]).sum() + model(parts[0]).square().sum()).backward()
    assert model[0].weight.grad is not None


# No trace


class Traces(nn.Module):
    """A forward that leaves a trace wherever it can."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("average", torch.zeros(4))
        self.count, self.kept, self.log, self.cache = 0, torch.zeros(4), [], {"last": torch.zeros(4)}
        self.state, self.nested = {"calls": 0}, {"lists": [[]], "arrays": (numpy.zeros(1),)}
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x):
        self.count += 1
        self.state["calls"] += 1
        self.log.append(self.count)
        self.nested["lists"][0].append(1)
        self.nested["arrays"][0][0] += 1
        z = F.dropout(self.norm(self.a(x)), 0.1) * random.random() * numpy.random.rand()
        with torch.no_grad():
            self.average += z.mean(0)
            self.kept += z.mean(0)
            self.frozen.mul_(0.9).add_(z.mean(0))
            self.cache["last"] += z.mean(0)
        self.last = z.detach()
        return self.b(z)


def seeded(verify, hooks=None):
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    model, calls = Traces(), []
    for module in (model, model.a):
        for register in hooks or ():
            getattr(module, register)(lambda *_: calls.append(1))
    optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9, batch_norm="contribution", verify=verify)
    data = torch.randn(3, B, 5)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, calls, data


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_training_has_the_same_bits_and_state():
    hooks = "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"
    (model, calls, data), (other, plain_calls, plain_data) = seeded(True, hooks), seeded(False, hooks)
    assert torch.equal(data, plain_data)
    assert len(calls) == len(plain_calls) == 18
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert (model.count, model.log, model.state) == (3, [1, 2, 3], {"calls": 3})
    assert (model.nested["lists"], model.nested["arrays"][0][0]) == ([[1, 1, 1]], 3)
    assert torch.equal(model.kept, other.kept)
    assert torch.equal(model.cache["last"], other.cache["last"])
    assert torch.equal(model.last, other.last)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    seeded(False)
    again = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(states[0], again[0])
    assert states[1:] == again[1:]


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_train_with_the_same_bits(name):
    build, inputs_of = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build(), inputs_of(5)
    trained = []
    for verify in (True, False):
        copied = copy.deepcopy(model)
        optimizer = rgd_ext.RGD(copied, lr=0.1, verify=verify)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(copied(*inputs)).backward()
            optimizer.step()
        trained.append(flat_grad(copied))
    assert torch.equal(*trained)


def test_gradients_stats_and_plan_stay():
    model, x = mlp(), torch.randn(B, 6)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(x)).backward()
        grad, stats, plan = [p.grad for p in model.parameters()], handle.stats, str(handle.plan())
        kept = [g.clone() for g in grad]
        print(rgd_ext.verify(model, torch.randn(2, 6)))
        assert all(p.grad is g for p, g in zip(model.parameters(), grad, strict=True))
        assert all(map(torch.equal, grad, kept))
        assert handle.stats is stats
        assert str(handle.plan()) == plan


def test_buffers_are_the_same_objects_even_after_an_error():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), Net(less_the_mean, a=nn.Linear(4, 4), b=nn.Linear(4, 2)))
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    attributes = [dict(vars(module)) for module in model.modules()]
    with rgd_ext.precondition(model, batch_norm="contribution"):
        attributes = [dict(vars(module)) for module in model.modules()]
        with pytest.raises(ValueError, match="mixes samples"):  # besides the batch normalisation
            model(torch.randn(B, 5))
        for name, buffer in model.named_buffers():
            assert buffer is before[name][0]
        assert [dict(vars(module)) for module in model.modules()] == attributes


def test_hooks_that_change_outputs_are_seen():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(B, 5)
    model[1].register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    with rgd_ext.precondition(model), pytest.raises(ValueError, match="mixes samples"):
        model(x)


def test_global_hooks_see_what_the_user_calls():
    calls, model = [], mlp()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        with rgd_ext.precondition(model):
            model(torch.randn(B, 6))
    finally:
        hook.remove()
    assert len(calls) == 6


def test_an_argument_that_can_be_read_once():
    model = Net(lambda m, x, factors: m.a(x) * next(factors), a=nn.Linear(5, 4))
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match="iterator"):
        loss_of(model(torch.randn(B, 5), iter([2.0]))).backward()


def test_hooks_that_a_forward_needs():
    model, calls = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(3, 2)), []
    model[1].register_forward_hook(lambda module, inputs, output: calls.append(1) or output[:, :3])
    assert rgd_ext.verify(model, torch.randn(B, 5)).samples


def test_a_proof_takes_little_more_memory_than_a_step():
    from bench.memory import extra_memory
    from bench.verification import first_step

    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 1000))
    x, y = torch.randint(50, (16, 32)), torch.randint(1000, (16, 32))
    first_step(model, x, y, verify=True)
    proven, plain = (extra_memory(partial(first_step, model, x, y, verify), "cpu") for verify in (True, False))
    assert proven < 1.2 * plain


def test_nothing_is_called_once_proven():
    model, calls = Net(lambda m, x: calls.append(1) or m.a(x), a=nn.Linear(5, 4)), []
    with rgd_ext.precondition(model):
        model(torch.randn(B, 7, 5))
        del calls[:]
        for length in (7, 8, 9):  # other lengths are not another kind
            model(torch.randn(B, length, 5))
    assert len(calls) == 3


def test_the_number_of_proofs_is_bounded():
    calls = []
    model = Net(lambda m, x: calls.append(1) or m.a(x), a=nn.Linear(5, 4))
    with rgd_ext.precondition(model):
        for size in range(2, 30):
            model(torch.randn(size, 5))
    assert len(calls) < 28 + 8 * 6


# What cannot be proven


def test_a_forward_that_refuses_a_second_call_trains_on():
    calls = []

    def forward(m, x):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("one call at a time")
        return m.a(x)

    model = Net(forward, a=nn.Linear(5, 4)).double()
    x = double(B, 5)
    with rgd_ext.precondition(model) as handle:
        with pytest.warns(UserWarning, match=r"could not be verified.*one call at a time.*verify=False") as said:
            loss_of(model(x)).backward()
        del calls[:]
        expected = flat_grad(model)
        loss_of(model(x)).backward()
    assert len(said) == 1
    assert handle.stats.batch_size == B
    assert_close(flat_grad(model), 2 * expected)
    assert_close(expected, weak_field(per_sample_gradients(model.a, loss_of, [x])))


@pytest.mark.parametrize("where", ["_combined", "_columns"])
def test_a_proof_that_breaks_down_stops_no_training(where, monkeypatch):
    def fail(*_):
        raise NotImplementedError("no such tensor")

    monkeypatch.setattr(f"rgd_ext.capture.proof.Proof.{where}", fail)
    model, x = mlp(), torch.randn(B, 6)
    with rgd_ext.precondition(model) as handle:
        with pytest.warns(UserWarning, match="could not be verified: NotImplementedError: no such tensor"):
            output = model(x)
        loss_of(output).backward()
    assert handle.stats.batch_size == B


def test_random_numbers_from_elsewhere_are_no_error():
    model = Net(lambda m, x: m.a(x) * float(numpy.random.default_rng().random()), a=nn.Linear(5, 4))
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match="outputs change from call to call"):
        model(torch.randn(B, 5))


def test_numbers_that_are_not_finite_leave_the_next_call_to_be_proven():
    model, x = Net(less_the_mean, a=nn.Linear(5, 4), b=nn.Linear(4, 2)), torch.randn(B, 5)
    with rgd_ext.precondition(model):
        with pytest.warns(UserWarning, match="not finite"):
            model(x * float("nan"))
        with pytest.raises(ValueError, match="mixes samples"):
            model(x)


def test_errors_of_the_forward_itself_come_through():
    with rgd_ext.precondition(mlp()) as handle, pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        handle.model(torch.randn(B, 7))


def test_outputs_without_tensors_are_said_once():
    class Opaque:
        def __init__(self, logits):
            self.logits = logits

    model = Net(lambda m, x: Opaque(m.a(x)), a=nn.Linear(5, 4))
    with rgd_ext.precondition(model):
        with pytest.warns(UserWarning, match="no tensor among its outputs"):
            model(torch.randn(B, 5))
        loss_of(model(torch.randn(B + 1, 5)).logits).backward()
    with pytest.raises(RuntimeError, match="no tensor among its outputs"):
        rgd_ext.verify(model, torch.randn(B, 5))


def test_one_sample_and_none():
    verification = rgd_ext.verify(mlp(), torch.randn(1, 6))
    assert verification.samples == ()
    assert not verification.note
    with pytest.raises(RuntimeError, match="no samples"):
        rgd_ext.verify(mlp(), torch.randn(0, 6))


def test_the_report_prints_well():
    text = str(rgd_ext.verify(mlp(), torch.randn(B, 6)))
    assert re.fullmatch(
        r"verified: 6 parameters, samples 0 and 5 of 6 alone; largest relative error \d\.\de-\d\d"
        r" \('[\w.]+', tolerance 3e-03\); \d\.\d{3} s",
        text,
    )


def test_bad_arguments_of_verify():
    with pytest.raises(TypeError, match="model is a str"):
        rgd_ext.verify("model", torch.randn(B, 6))
    with pytest.raises(TypeError, match="verify is 1"):
        rgd_ext.precondition(mlp(), verify=1)
    with pytest.raises(TypeError, match="RGD got verify with parameters"):
        rgd_ext.RGD(mlp().parameters(), lr=0.1, verify=False)
    with pytest.raises(ValueError, match=r"\(ModuleDict\) has no forward"):
        rgd_ext.verify(nn.ModuleDict({"a": nn.Linear(3, 2)}), torch.randn(B, 3))
    with rgd_ext.precondition(mlp()) as handle:
        with handle.paused(), pytest.raises(RuntimeError, match=r"leave `with handle\.paused\(\):`"):
            rgd_ext.verify(handle.model, torch.randn(B, 6))
        with torch.no_grad():
            assert rgd_ext.verify(handle.model, torch.randn(B, 6)).samples
        assert rgd_ext.verify(handle.model[0], torch.randn(B, 6)).parameters == 2
