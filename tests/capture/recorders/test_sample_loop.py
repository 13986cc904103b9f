"""Units that torch.func.vmap cannot run take one sample after the other, and models may take one sample per call."""

import copy
import math

import numpy
import pytest
import torch
from capturing import B, as_unit, assert_exact, double, expected_direction, loss_of, own_type
from models import Net
from oracle import assert_close, flat, flat_grad, weak_field
from torch import nn

import rgd_ext


def linears(**others):
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 3), **others}


def experts(m, x):
    y, chosen = x.new_zeros(len(x), 3), m.a(x).argmax(-1)
    for number, expert in enumerate((m.b, m.c)):
        rows = (chosen % 2 == number).nonzero()[:, 0]
        y = y.index_add(0, rows, expert(x[rows]) * m.a(x)[rows, :1])
    return y


def masked(m, x):
    h = m.a(x)
    mask = h[..., 0] > 0
    return m.b(h.masked_scatter(mask[..., None], h[mask].tanh() * 2))


def branches(m, x):
    h = m.a(x)
    return m.b(h.tanh() if (h.detach().abs() < 9).all() else h)


def normalised_in_place(m, x):
    with torch.no_grad():
        m.w.copy_(nn.functional.normalize(m.w))
    return x @ nn.functional.normalize(m.w)


def sorted_first(m, x):
    order = x[:, 0, 0].argsort()
    return m.b(m.gru(x[order])[0][:, -1][order.argsort()])


SLOW = {
    "experts": lambda: own_type(experts, **linears(c=nn.Linear(4, 3))),
    "mask": lambda: own_type(masked, **linears()),
    "branches": lambda: own_type(branches, **linears()),
    "changed in place": lambda: own_type(normalised_in_place, w=nn.Parameter(torch.randn(4, 3))),
}


@pytest.mark.parametrize("name", SLOW)
def test_units_that_vmap_cannot_run_match_the_oracle_and_are_named_once(name):
    torch.manual_seed(0)
    model, x = SLOW[name]().double(), double(B, 4)
    if name == "changed in place":
        model(x)  # as it will be in every forward
    expected = expected_direction(model, x)
    as_unit(model)
    # Forwards that change parameters spoil each other's backward, which ends the verification.
    with rgd_ext.precondition(model, verify=name != "changed in place"):
        with pytest.warns(UserWarning, match="one sample after the other"):
            loss_of(model(x)).backward()
        assert_close(flat_grad(model), expected)
        model.zero_grad()
        if name == "changed in place":
            weight = model.w.detach().clone()
            model.w.data *= 2
        loss_of(model(x)).backward()  # without another warning
        assert_close(flat_grad(model), expected)
    if name == "changed in place":
        assert_close(model.w, weight)


RESULTS = [
    lambda y, is_large: y[:, : 1 + is_large],
    lambda y, is_large: (y, is_large),
    lambda y, is_large: (y, numpy.zeros(2)),
]


@pytest.mark.parametrize("result", RESULTS)
def test_samples_that_give_other_results_are_refused(result):
    model = own_type(lambda m, x: result(m.a(x), bool(x[0, 0] > 0)), a=nn.Linear(4, 3))
    as_unit(model)
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 4)
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"gives .* for another.*batch_dim=None"):
        model(x)


def test_samples_may_give_what_is_not_a_number():
    model = own_type(lambda m, x: (m.a(x) * (1 if x.sum() > -100 else 2), math.nan), a=nn.Linear(4, 3)).double()
    as_unit(model)
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match="one sample after the other"):
        assert math.isnan(model(double(B, 4))[1])


def test_vmap_is_not_tried_again():
    runs = []

    def forward(m, x):
        runs.append(x)
        return m.b(x) if x.sum().item() > 0 else m.a(x)

    model = own_type(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    as_unit(model)
    with rgd_ext.precondition(model, verify=False):
        with pytest.warns(UserWarning, match="one sample after the other"):
            model(torch.randn(B, 4))
        runs.clear()
        model(torch.randn(B, 4))
    assert len(runs) == B


def test_recurrent_layers_in_a_unit_match_the_oracle():
    gru = nn.GRU(4, 4, 2, batch_first=True, bidirectional=True)
    model, x = own_type(sorted_first, gru=gru, b=nn.Linear(8, 3)).double(), double(B, 5, 4)
    expected = expected_direction(model, x)
    as_unit(model)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected)
    assert "forward" not in vars(model.gru)


def test_a_module_by_itself_can_be_a_unit():
    merged = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3), nn.Unflatten(0, (-1, 5)))
    model, x = nn.Sequential(nn.Linear(4, 4), merged, nn.Linear(3, 2)).double(), double(B, 5, 4)
    expected = expected_direction(model, x)
    with pytest.raises(ValueError, match=r"register_rule\(enclosing, rgd_ext\.unit\)"):
        rgd_ext.verify(model, x)
    rgd_ext.register_rule(merged, rgd_ext.unit)
    with rgd_ext.precondition(copy.deepcopy(model)) as handle:
        loss_of(handle.model(x)).backward()
    assert_close(flat_grad(handle.model), expected)


def test_a_unit_that_runs_one_by_one_may_count_its_calls_and_not_sum_its_inputs():
    def forward(m, x):
        m.b.count = m.b.count + x.sum() * m.of_input + (m.a(x) > 9).any().item() + 1
        return m.b(m.a(x))

    for of_input in (False, True):
        model, x = own_type(forward, **linears()), torch.randn(B, 4)
        model.of_input = of_input
        model.b.register_buffer("count", torch.zeros(()))
        count = model.b.count
        as_unit(model)
        with rgd_ext.precondition(model, verify=False):
            if of_input:
                with pytest.raises(ValueError, match=r"'count'.*batch_dim=None"):
                    model(x)
                assert model.b.count is count
            else:
                with pytest.warns(UserWarning, match="one sample after the other"):
                    model(x)
        assert count == 1 - of_input


def graph(m, x, edges):
    messages = torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, edges[1], m.a(x)[edges[0]])
    return m.b(messages.relu()).mean(0) + m.p


CALLS = {
    "graphs": (
        lambda: own_type(graph, **linears(p=nn.Parameter(torch.randn(3)))),
        [(double(n, 4), torch.randint(n, (2, 7))) for n in (3, 6, 2)],
    ),
    "images of several sizes": (
        lambda: own_type(lambda m, x: m.b(m.c(x[0]).mean((1, 2))), c=nn.Conv2d(3, 4, 3), b=nn.Linear(4, 2)),
        [([double(3, n, 5)],) for n in (3, 6, 4)],
    ),
    "sequences without a batch": (
        lambda: own_type(lambda m, x: m.b(m.l(m.e(x))[0]), e=nn.Embedding(9, 4), l=nn.LSTM(4, 4, 2), b=nn.Linear(4, 2)),
        [(torch.randint(9, (n,)),) for n in (3, 6, 2)],
    ),
    "attention without a batch": (
        lambda: own_type(lambda m, x: m.b(m.l(x, x, x)[0]), l=nn.MultiheadAttention(4, 2), b=nn.Linear(4, 2)),
        [(double(n, 4),) for n in (3, 6, 2)],
    ),
    "experts": (
        lambda: own_type(experts, **linears(c=nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)))),
        [(double(n, 4),) for n in (1, 3, 2)],
    ),
    "changed in place": (
        lambda: own_type(normalised_in_place, w=nn.Parameter(torch.randn(4, 3))),
        [(double(1, 4),) for _ in range(3)],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_sample_per_call_matches_the_oracle(name):
    """`batch_dim=None` with accumulate(), the remedy of last resort."""
    torch.manual_seed(0)
    kind, calls = CALLS[name]
    model = kind().double()
    rows = []
    for arguments in calls:
        loss = loss_of(model(*arguments))
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(flat(grads))
    if name == "changed in place":
        model.w.data *= 2
    handle = rgd_ext.RGD(model, batch_dim=None, verify=name != "changed in place").preconditioner
    with handle.accumulate():
        for arguments in calls:
            (loss_of(model(*arguments)) / len(calls)).backward()
    assert handle.stats.batch_size == len(calls)
    if name == "changed in place":
        assert_close(model.w.norm(dim=1), torch.ones(4).double())
    got = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    assert_close(got, weak_field(torch.stack(rows)))


class Cache:
    def __init__(self):
        self.keys = []


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, cache=None, use_cache=True):
        keys = self.a(x)
        if not use_cache:
            return self.b(x) * keys
        (cache if cache is not None else (found := Cache())).keys.append(keys)
        y = self.b(x) * keys
        return y if cache is not None else (y, found)


@pytest.mark.parametrize("gives", [lambda m, x: m.d(x)[0], lambda m, x: m.d(x, Cache())])
def test_units_that_fill_caches_are_refused_and_exact_without(gives):
    model, x = Net(gives, d=Decoder()).double(), double(B, 5, 4)
    rgd_ext.register_rule(model.d, rgd_ext.unit)
    for verify in (True, False):
        with rgd_ext.precondition(model, verify=verify), pytest.raises(ValueError, match=r"'d' .*use_cache=False"):
            model(x)
    without = Net(lambda m, x: m.d(x, use_cache=False), d=model.d)
    assert_exact(without, x)
