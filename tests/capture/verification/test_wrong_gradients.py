"""Wrong per-sample gradients are found without knowing their kinds, before the first direction."""

import pytest
import torch
import torch.nn.functional as F
from capturing import (
    B,
    as_unit,
    captured_grad,
    double,
    forget_rule,
    layers,
    less_the_mean,
    loss_of,
    own_type,
    raw_parameter,
)
from models import Net, two_layers
from oracle import assert_close, per_sample_gradients, weak_field
from torch import nn

import rgd_ext


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
    model = two_layers(lambda m, x, links: m.b((links @ m.a(x)).relu()))
    links = (torch.rand(B, B) < 0.4).float() + torch.eye(B)
    for adjacency in (links, links.to_sparse()):
        with pytest.raises(ValueError, match="the forward mixes samples"):
            rgd_ext.verify(model, torch.randn(B, 5), adjacency)


def test_the_error_says_that_the_forward_mixes_samples_and_by_how_much():
    with pytest.raises(ValueError, match=r"mixes samples, since the outputs for one change by \d.*convert_batch_norm"):
        rgd_ext.verify(two_layers(less_the_mean), torch.randn(B, 5))


def shuffled(m, x):
    z = m.a(x).tanh()
    return m.b(z + z[torch.rand(len(z)).argsort()])


def shuffled_by_a_stable_sort(m, x):
    z = m.a(x).tanh()
    return m.b(z + z[torch.rand(len(z)).argsort(stable=True)])


def one_of_three(m, x):
    z = m.a(x).tanh()
    return m.b((z, z + z.flip(0), z)[torch.randint(3, ())])


def random_share(m, x):
    z = m.a(x).tanh()
    return m.b(z - z[torch.rand(len(z)).topk(3).indices].mean(0))


def rolled(m, x):
    z = m.a(x).tanh()
    return m.b(z + z.roll(int(torch.randint(len(z), ())), 0))


def half_the_time(m, x):
    return less_the_mean(m, x) if torch.rand(()) > 0.5 else m.b(m.a(x).tanh())


def swap_noise(m, x):
    z = m.a(x).tanh()
    return m.b(torch.where(torch.rand_like(z) < 0.15, z[torch.randperm(len(z))], z))


@pytest.mark.parametrize(
    "forward",
    [shuffled, shuffled_by_a_stable_sort, random_share, rolled, one_of_three, half_the_time, swap_noise],
    ids=lambda forward: forward.__name__,
)
def test_random_numbers_that_mix_samples_are_found_by_the_second_call(forward):
    for seed in range(4):
        torch.manual_seed(seed)
        model = two_layers(forward)
        with pytest.raises(ValueError, match="mixes samples"):
            rgd_ext.verify(model, torch.randn(B, 5))
        with rgd_ext.precondition(model):
            with pytest.raises(ValueError, match="mixes samples"):  # noqa: PT012
                model(torch.randn(B, 5))
                model(torch.randn(B, 5))
            with pytest.raises(ValueError, match="mixes samples"):
                model(torch.randn(B, 5))


def test_mixing_is_found_where_a_forward_takes_no_other_values():
    def forward(m, x):
        if x.min() < 0 or x.max() > 1:
            raise ValueError("probabilities")
        return less_the_mean(m, x)

    model, x = two_layers(forward), torch.rand(B, 5).round()
    with pytest.raises(ValueError, match="mixes samples"):
        rgd_ext.verify(model, x)


def test_mixing_is_found_in_low_precision():
    model = two_layers(less_the_mean).bfloat16()
    with pytest.raises(ValueError, match="mixes samples"):
        rgd_ext.verify(model, torch.randn(B, 5).bfloat16())


# Sizes that agree by chance, and samples that change places. With the remedy all of them are exact


def positions(m, x, of_table=False):
    t = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
    table = m.table[: x.shape[1]] * 2 if of_table else torch.stack([t, t * t], 1)
    return m.out((m.body(x) + m.positions(table)).tanh()).mean(1)


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
        forget_rule(kind)
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


def test_samples_that_change_places_inside_are_found():
    order = torch.tensor([0, 2, 1, 4, 3, 5])
    model = two_layers(lambda m, x: m.b(m.a(x)[order].tanh())[order])
    with pytest.raises(ValueError, match=r"do not follow their own samples.*the capture credits"):
        rgd_ext.verify(model, torch.randn(B, 5))


# Kinds of calls


def test_another_batch_size_is_proven_again():
    model = raw_parameter()
    with rgd_ext.precondition(model):
        model(torch.randn(B, 3, 5))
        with pytest.raises(ValueError, match="relative error"):
            model(torch.randn(3, 3, 5))
        with pytest.raises(ValueError, match="relative error"):
            model(torch.randn(B, B, 5))  # the same batch size, but now of as many places
    build, (x,), _ = CHANCE["as many heads as samples"]
    model = build().double()
    with rgd_ext.precondition(model):
        model(double(4, *x.shape[1:]))
        with pytest.raises(ValueError, match=r"relative error|other values for a batch"):
            model(x)


def test_another_mode_and_what_is_trained_are_proven_again():
    def forward(m, x):
        z = m.a(x).tanh()
        return m.b(z - z.mean(0) if m.training else z)

    model = two_layers(forward).eval()
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
    model = nn.ModuleDict({"part": two_layers(less_the_mean)})
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"parameter 'part\.(a|b)\..*mixes samples"):
        model["part"](torch.randn(B, 5))


def test_what_is_no_tensor_is_part_of_the_kind():
    def forward(m, x, mix):
        mix = mix["mix"] if isinstance(mix, dict) else mix
        return m.b(m.a(x).flip(0)).flip(0) if mix else m.b(m.a(x))

    model, x = two_layers(forward), torch.randn(B, 5)
    with rgd_ext.precondition(model):
        for plain, other in ((False, True), (0, 1), ({"mix": ""}, {"mix": "yes"})):
            model(x, plain)
            with pytest.raises(ValueError, match="relative error"):
                model(x, other)


def test_a_mode_of_a_module_inside_is_part_of_the_kind():
    inner = Net(lambda m, x: F.batch_norm(x, None, None, training=True) if m.training else x).eval()
    model, x = Net(lambda m, x: m.inner(m.a(x)), a=nn.Linear(5, 4), inner=inner), torch.randn(B, 5)
    with rgd_ext.precondition(model):
        model(x)
        inner.train()
        with pytest.raises(ValueError, match="mixes samples"):
            model(x)


@pytest.mark.parametrize("gate", [0, 1e-6])
@pytest.mark.parametrize("batches", [1, 5])
def test_weights_behind_zeros_are_proven_when_they_are_none(gate, batches):
    def forward(m, x):
        return m.a(x) + m.gate * m.b(m.a(x).flip(0)).flip(0)

    model = Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 4), gate=nn.Parameter(torch.full((4,), float(gate))))
    optimizer = rgd_ext.RGD(model, lr=0.1)
    with pytest.raises(ValueError, match=r"parameter '\w\.\w+'.*relative error"):  # noqa: PT012
        for _ in range(2 if gate == 0 else 5):
            with optimizer.preconditioner.accumulate():
                for _ in range(batches):
                    loss_of(model(torch.randn(B, 5))).backward()
            optimizer.step()


# Nothing hides them


def test_batch_normalisation_hides_no_other_fault():
    model = Net(
        lambda m, x: m.b(m.norm(m.a(x)).flip(0)).flip(0), a=nn.Linear(5, 4), norm=nn.BatchNorm1d(4), b=nn.Linear(4, 2)
    )
    with rgd_ext.precondition(model, batch_norm="contribution"):
        with pytest.raises(ValueError, match="the capture credits"):
            model(torch.randn(B, 5))
        assert model.norm.num_batches_tracked == 0


def test_a_loss_inside_the_model_does_not_hide_wrong_samples():
    model = Net(lambda m, x, y: F.mse_loss(m.inner(x), y, reduction="sum"), inner=raw_parameter())
    assert rgd_ext.verify(model, torch.randn(B, 3, 5), torch.randn(B, 2)).samples
    with pytest.raises(ValueError, match=r"'inner\.p'.*relative error"):
        rgd_ext.verify(model, torch.randn(B, B, 5), torch.randn(B, 2))


def test_parameters_that_only_the_loss_depends_on_are_proven():
    def forward(m, x, y):
        return m.a(x), F.mse_loss(m.inner(x), y)

    model = Net(forward, a=nn.Linear(5, 4), inner=raw_parameter())
    assert rgd_ext.verify(model, torch.randn(B, 3, 5), torch.randn(B, 2)).samples
    with pytest.raises(ValueError, match=r"'inner\.p'.*relative error"):
        rgd_ext.verify(model, torch.randn(B, B, 5), torch.randn(B, 2))


def test_hooks_that_change_outputs_are_seen():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(B, 5)
    model[1].register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    model.append(nn.BatchNorm1d(2))
    with rgd_ext.precondition(model, batch_norm="contribution"), pytest.raises(ValueError, match="mixes samples"):
        model(x)
    assert model[-1].num_batches_tracked == 0
