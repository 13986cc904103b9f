"""Models and habits that would give a wrong direction in silence, were they not recognised."""

import copy

import pytest
import torch
import torch.nn.functional as F
from capturing import captured_grad, loss_of
from models import Net, mlp
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from torch import nn
from torch.utils.checkpoint import checkpoint

import rgd_ext


def check(model, *inputs):
    model = model.double()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    assert_close(captured_grad(model, *inputs), weak_field(per_sample_gradients(model, loss_of, inputs)))


# Derivatives of derivatives, and hooks


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


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_on_parameters_are_refused(hook, when):
    model, x = mlp(), torch.randn(5, 6)
    if when == "before":
        getattr(model[0].weight, hook)(lambda value: None)
    with pytest.raises(ValueError, match=r"'0\.weight' has gradient hooks"):  # noqa: PT012
        rgd_ext.precondition(model)
        getattr(model[0].weight, hook)(lambda value: None)
        loss_of(model(x)).backward()
    assert model[2].weight.grad is None


# The model changes


@pytest.mark.parametrize("where", [0, 2])
def test_a_backward_that_ran_inside_another_is_noticed(where):
    model, x, other = mlp(), torch.randn(5, 6), torch.randn(4, 6)

    with rgd_ext.precondition(model):
        loss = loss_of(model(other))
        hidden = model[:where](x.requires_grad_())
        hidden.register_hook(lambda grad: loss.backward())
        with pytest.raises(RuntimeError, match=r"ran inside another one.*paused\(\)"):
            loss_of(model[where:](hidden)).backward()
        written = flat_grad(model)
        model.zero_grad()
        loss_of(model(other)).backward()
        assert torch.equal(flat_grad(model), written)


def test_a_backward_inside_another_that_has_not_met_the_model_yet():
    model, x, other = mlp().double(), torch.randn(5, 6).double(), torch.randn(4, 6).double()
    directions = []
    with rgd_ext.precondition(model):
        output, loss = model(x), loss_of(model(other))

        def inner(grad):
            loss.backward()
            directions.append(flat_grad(model))
            model.zero_grad()

        output.register_hook(inner)
        loss_of(output).backward()
        directions.append(flat_grad(model))
    for inputs, found in zip((other, x), directions, strict=True):
        assert_close(found, captured_grad(copy.deepcopy(model), inputs))


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_parameter_frozen_between_forward_and_backward_gets_no_gradient(layer, frozen):
    model = copy.deepcopy(layer).double()
    x = torch.randn(5, 4, 1).double() if isinstance(layer, nn.Conv1d) else torch.randn(5, 4).double()
    with rgd_ext.precondition(model):
        loss = loss_of(model(x))
        getattr(model, frozen).requires_grad_(False)
        loss.backward()
    assert getattr(model, frozen).grad is None
    assert_close(flat_grad(model), weak_field(per_sample_gradients(model, loss_of, [x])))


def test_module_that_came_after_the_capture_is_refused():
    model = Net(lambda m, x: m.head(m.body(x).tanh()), body=nn.Linear(4, 5), head=nn.Linear(5, 3))
    with rgd_ext.precondition(model):
        model.head = nn.Linear(5, 2)
        with pytest.raises(ValueError, match=r"'head\.weight' came into the model after its capture"):
            model(torch.randn(6, 4))


def test_parameters_assigned_by_load_state_dict():
    def state(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 3)), torch.randn(5, 4, 6, 6)
    with rgd_ext.precondition(model, memory_budget=float("inf")) as handle:
        for _ in range(3):
            model.load_state_dict(state(model), assign=True)
            rgd_ext.RGD(model.parameters(), lr=0.1)
            loss_of(model(x)).backward()
        assert [layer.name for layer in handle.plan().layers] == ["0", "2"]
        assert handle.guards.keys() == set(map(id, model.parameters()))
    assert_close(flat_grad(model).double(), weak_field(per_sample_gradients(model, loss_of, [x])), torch.float32)


def test_a_layer_thawed_in_a_forward_that_does_not_use_it():
    model = Net(lambda m, x: m.b(m.a(x)) if m.is_deep else m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 3)).double()
    x, model.is_deep = torch.randn(6, 4).double(), False
    model.b.requires_grad_(False)
    with rgd_ext.precondition(model):
        model.b.requires_grad_(True)
        model(x)
        model.is_deep = True
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), weak_field(per_sample_gradients(model, loss_of, [x])))


def test_functional_call_differentiates_its_own_values():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(5, 4)
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.autograd.grad(loss_of(model(x)), list(model.parameters()))
    with rgd_ext.precondition(model):
        loss_of(torch.func.functional_call(model, values, (x,))).backward()
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close([v.grad for v in values.values()], list(expected))


def test_indices_of_32_bits_into_a_large_table():
    model, x = nn.Embedding(6_000_000, 1), torch.randint(6_000_000, (500, 2))
    x[:, 1] = x[:, 0] // 2  # rows that samples share
    expected = captured_grad(model, x)
    model.zero_grad()
    assert torch.equal(captured_grad(model, x.int()), expected)


def test_inputs_by_keyword_in_another_order():
    model = Net(lambda m, a, b: m.layer(input2=b, input1=a), layer=nn.Bilinear(3, 3, 2))
    check(model, torch.randn(5, 3), torch.randn(5, 3))


def test_parameter_replaced_after_the_capture_is_captured():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double(), torch.randn(6, 4, dtype=torch.float64)
    with rgd_ext.precondition(model):
        model[0].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), weak_field(per_sample_gradients(model, loss_of, [x])))


def test_wrapper_put_around_a_captured_forward_survives_remove():
    model, x = mlp(), torch.randn(5, 6)
    handle = rgd_ext.precondition(model)
    inner = model[0].forward
    model[0].forward = lambda x: inner(x) * 2
    handle.remove()
    assert_close(model(x).detach(), model[1:](2 * F.linear(x, model[0].weight, model[0].bias)).detach())
    loss_of(model(x)).backward()
    assert model[0].weight.grad is not None


def test_mode_is_that_of_the_forward():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = captured_grad(copy.deepcopy(model), x)
    with rgd_ext.precondition(model):
        loss = loss_of(model(x))
        model.train()
        loss.backward()
    assert_close(flat_grad(model), expected)


# Values that all samples share


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        return (x / scale).round() * scale

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.sum()


def test_raw_parameter_that_slips_past_torch_function_is_refused():
    model = Net(lambda m, x: Round.apply(m.body(x), m.p), body=nn.Linear(4, 4), p=nn.Parameter(torch.tensor(0.3)))
    with pytest.raises(ValueError, match=r"'p' of module 'Net' .*autograd\.Function.*rgd_ext\.unit"):
        captured_grad(model, torch.randn(6, 4))
    assert all(p.grad is None for p in model.parameters())


SHARED = {
    "type_as": ((1, 4), lambda m, x: m.body(x) * m.p.type_as(x)),
    "to like the batch": ((), lambda m, x: m.body(x) * m.p.to(x)),
    "value read": ((4,), lambda m, x: m.body(x) * m.p if m.p.sum() > -100 and m.p[0].item() > -100 else x),
}


@pytest.mark.parametrize("name", ["type_as", "to like the batch", "value read"])
def test_uses_of_a_raw_parameter(name):
    shape, forward = SHARED[name]
    check(Net(forward, body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(shape))), torch.randn(6, 4))


def test_table_looked_up_by_an_input_of_the_model():
    model = Net(lambda m, x, y: m.body(x) + m.p[y], body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(9, 4)))
    check(model, torch.randn(6, 4), torch.randint(9, (6,)))


def test_functional_batch_norm_of_a_container_is_refused():
    def forward(m, x):
        return F.batch_norm(m.body(x), None, None, m.p, None, training=True)

    model = Net(forward, body=nn.Linear(4, 4), p=nn.Parameter(torch.ones(4)))
    with pytest.raises(ValueError, match="couples the samples"):
        captured_grad(model, torch.randn(6, 4))


def test_shared_value_beside_the_batch_in_a_layer_is_refused():
    parts = {"body": nn.Linear(4, 4), "pair": nn.Bilinear(4, 4, 3), "p": nn.Parameter(torch.randn(1, 4))}
    with pytest.raises(ValueError, match=r"'pair' got a value shared by all samples among several inputs"):
        captured_grad(Net(lambda m, x: m.pair(m.body(x), m.p), **parts), torch.randn(6, 4))


def test_unused_parameters_of_a_unit_get_no_gradient():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * 2

    model, x = Unused(), torch.randn(6, 4, requires_grad=True)
    assert rgd_ext.precondition(model).stats is None
    loss_of(model(x)).backward()
    assert model.gain.grad is None
    assert x.grad is not None


def test_data_kept_in_a_buffer_is_the_batch_when_it_is_the_input():
    model = Net(lambda m, x: m.body(x), body=nn.Linear(4, 4), data=torch.randn(6, 4)).double()
    expected = weak_field(per_sample_gradients(model, loss_of, [model.data]))
    assert_close(captured_grad(model, model.data), expected)


# Shapes that agree by chance: as many samples as positions


def buffers_as_long_as_the_batch():
    rope = Net(lambda m, x, table: x * m.gain + table * m.gain.sin(), gain=nn.Parameter(torch.randn(4)))
    return {
        "buffer into a unit": Net(
            lambda m, x: m.rope(m.body(x), m.table[: x.shape[1]]),
            body=nn.Linear(4, 4),
            rope=rope,
            table=torch.randn(8, 4),
        ),
        "buffer meets a raw parameter": Net(
            lambda m, x: m.body(x) + m.scale * m.table[: x.shape[1]],
            body=nn.Linear(4, 4),
            scale=nn.Parameter(torch.randn(1)),
            table=torch.randn(8, 4),
        ),
        "buffer into a layer": Net(
            lambda m, x: m.body(x) + m.project(m.table[: x.shape[1]]),
            body=nn.Linear(4, 4),
            project=nn.Linear(2, 4),
            table=torch.randn(8, 2),
        ),
        "buffer of indices": Net(
            lambda m, x: m.body(x) + m.bias[m.index[: x.shape[1], : x.shape[1]]].sum(1, keepdim=True),
            body=nn.Linear(4, 4),
            bias=nn.Parameter(torch.randn(9)),
            index=torch.randint(9, (8, 8)),
        ),
    }


@pytest.mark.parametrize("length", [3, 6])
@pytest.mark.parametrize("name", buffers_as_long_as_the_batch())
def test_buffers_are_not_taken_for_samples(name, length):
    check(buffers_as_long_as_the_batch()[name], torch.randn(6, length, 4))


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, mask):
        return (x @ self.q @ x.transpose(1, 2) + mask).softmax(-1) @ x


def test_square_mask_made_inside_is_refused_and_one_of_another_length_is_exact():
    def forward(m, x):
        return m.attend(m.body(x), torch.full((x.shape[1],) * 2, -1e9, dtype=x.dtype).triu(1))

    model = Net(forward, body=nn.Linear(4, 4), attend=Attend())
    check(model, torch.randn(6, 3, 4))
    with pytest.raises(ValueError, match=r"'attend' got an input of shape \(6, 6\)"):
        captured_grad(model, torch.randn(6, 6, 4, dtype=torch.float64))


def test_square_of_positions_that_meets_a_raw_parameter():
    def forward(m, x):
        steps = torch.arange(x.shape[1], dtype=x.dtype)
        scores = m.body(x) @ x.transpose(1, 2) + m.slope * (steps[:, None] - steps).abs()
        return scores.softmax(-1) @ x

    model = Net(forward, body=nn.Linear(4, 4), slope=nn.Parameter(torch.tensor(0.3)))
    check(model, torch.randn(6, 3, 4))
    with pytest.raises(ValueError, match=r"slope' of shape \(\).*meets a tensor of shape \(6, 6\)"):
        captured_grad(model, torch.randn(6, 6, 4, dtype=torch.float64))


def test_module_that_couples_samples_is_refused():
    class Standardise(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (x - x.mean(0)) * self.gain

    model = nn.Sequential(nn.Linear(4, 4), Standardise())
    with rgd_ext.precondition(model):
        model(torch.randn(1, 4))  # one sample shows nothing
        for _ in range(2):
            with pytest.raises(ValueError, match=r"\(Standardise\).*couples the samples"):
                model(torch.randn(6, 4))


def test_module_that_couples_samples_and_draws_random_numbers_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return F.dropout(x, 0.5, self.training) * self.gain - x.mean()

    model, x = nn.Sequential(nn.Linear(4, 4), Noisy()), torch.randn(6, 4)
    with rgd_ext.precondition(model):
        for is_training in (True, False):
            model.train(is_training)
            with pytest.raises(ValueError, match=r"\(Noisy\).*couples the samples"):
                model(x)


class Average(nn.Module):
    """Keeps an average of what it saw, and counts."""

    def __init__(self, of_input):
        super().__init__()
        self.gain, self.of_input = nn.Parameter(torch.ones(4)), of_input
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        if self.of_input:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean()
        return x * self.gain


def test_buffers_of_a_unit():
    model, x = nn.Sequential(nn.Linear(4, 4), Average(of_input=False)), torch.randn(6, 4)
    with rgd_ext.precondition(model):
        for _ in range(3):
            model(x)
    assert model[1].count == 3
    model = nn.Sequential(nn.Linear(4, 4), Average(of_input=True))
    buffers = dict(model[1]._buffers)
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"'1', .* gives 'average'.*register_rule"):
        model(x)
    assert all(model[1]._buffers[name] is buffer for name, buffer in buffers.items())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_learned_initial_state_of_a_recurrent_layer(kind):
    def forward(model, x):
        start = model.start.expand(-1, x.shape[0], -1)
        return model.layer(x, (start, start) if kind is nn.LSTM else start)[0]

    model = Net(forward, layer=kind(3, 4, 2, batch_first=True))
    model.start = nn.Parameter(torch.randn(2, 1, 4))
    check(model, torch.randn(5, 6, 3))


@pytest.mark.parametrize("shape", [(1, 5, 4), (4, 5, 4), (2, 1, 4), (5, 4)])
def test_initial_state_of_another_shape_is_refused(shape):
    model = nn.GRU(3, 4, 2, batch_first=True)
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"initial state.*\(2, 5, m\)"):
        model(torch.randn(5, 6, 3), torch.zeros(shape))


def test_one_row_of_the_batch_is_not_shared_by_all():
    model = Net(lambda m, x: m.a(x) + m.b(x[:1]), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'b' got an input of shape \(1, 4\)"):
        captured_grad(model, torch.randn(6, 4))


# Parts of a model called by themselves


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(11, 4), nn.Embedding(20, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.tokens(x) + self.positions(torch.arange(x.shape[1])))


def test_submodule_called_from_outside():
    model, x = nn.ModuleDict({"encoder": Encoder()}).double(), torch.randint(11, (6, 5))
    expected = weak_field(per_sample_gradients(model["encoder"], loss_of, [x]))
    with rgd_ext.precondition(model):
        loss_of(model["encoder"](x)).backward()
        assert_close(flat_grad(model), expected)
        with pytest.raises(ValueError, match=r"positions' got an input of shape \(6,\)"):
            model["encoder"](torch.randint(11, (6, 6)))


def test_batch_in_a_mapping_or_a_dataclass():
    from collections import UserDict
    from dataclasses import dataclass

    @dataclass
    class Inputs:
        ids: torch.Tensor

    encoder, x = Encoder().double(), torch.randint(11, (6, 5))
    expected = captured_grad(copy.deepcopy(encoder), x)
    for forward, batch in (
        (lambda m, b: m.encoder(b["ids"]), UserDict(ids=x)),
        (lambda m, b: m.encoder(b.ids), Inputs(x)),
    ):
        assert_close(captured_grad(Net(forward, encoder=copy.deepcopy(encoder)), batch), expected)


def test_checkpointed_block_with_positions():
    encoder, x = Encoder().double(), torch.randint(11, (6, 5))
    expected = captured_grad(copy.deepcopy(encoder), x)
    model = Net(lambda m, x: checkpoint(m.encoder, x, use_reentrant=False), encoder=encoder)
    assert_close(captured_grad(model, x), expected)


# Refused by name


def old_weight_norm():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize("build", [old_weight_norm, lambda: nn.utils.spectral_norm(nn.Linear(4, 4))])
def test_weights_computed_in_hooks_are_refused(build):
    with pytest.raises(ValueError, match=r"computes its 'weight' in a hook.*parametrizations"):
        rgd_ext.precondition(nn.Sequential(build()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_script_modules_are_refused():
    with pytest.raises(ValueError, match="ScriptModule"):
        rgd_ext.precondition(nn.Sequential(torch.jit.script(nn.Linear(4, 4))))
