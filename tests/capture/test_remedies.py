"""Errors of the capture name remedies; here they are followed."""

import pytest
import torch
from capturing import B, as_unit, assert_exact, captured_grad, double, expected_direction, loss_of, own_type
from models import Net
from oracle import assert_close, flat_grad
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import rgd_ext


class Held:
    """Arguments in which no tensor is found."""

    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


@pytest.mark.filterwarnings("ignore:.*could not be verified completely")
def test_marks_count_where_the_model_does_not_tell_the_batch_size():
    unit = own_type(lambda m, x: m.a(x).cumsum(0), a=nn.Linear(4, 3))
    with_parameter = Net(lambda m, x: m.a(x) + m.p, a=nn.Linear(4, 3), p=nn.Parameter(torch.randn(3)))
    as_unit(unit)
    for part in (unit, with_parameter):
        model, x = Net(lambda m, held: m.part(held.x), part=part).double(), double(7, B, 4)
        samples_first = Net(lambda m, x: m.part(x.transpose(0, 1)).transpose(0, 1), part=part)
        expected = expected_direction(samples_first, x.transpose(0, 1))
        for module in part.modules():
            rgd_ext.mark(module, batch_dim=1)
        with rgd_ext.precondition(model):
            loss_of(model(Held(x))).backward()
        assert_close(flat_grad(model), expected)
    rgd_ext.mark(unit, batch_dim=None)
    model = Net(lambda m, held: m.part(held.x), part=unit)
    with rgd_ext.precondition(model), pytest.raises(ValueError, match="batch size is unknown"):
        model(Held(x))


def test_a_mark_that_contradicts_the_model_is_refused():
    part = own_type(lambda m, x: m.a(x).cumsum(0), a=nn.Linear(4, 3))
    as_unit(part)
    rgd_ext.mark(part, batch_dim=1)
    model, x = Net(lambda m, x: m.part(x), part=part), torch.randn(7, B, 4)
    with pytest.raises(ValueError, match=r"'part' got 6 samples.* called with 7.*batch_dim=1"):
        rgd_ext.verify(model, x)
    assert rgd_ext.verify(model, x, batch_dim=1).samples


class OwnCheckpoint(torch.autograd.Function):
    """As in code from before `use_reentrant=False`."""

    @staticmethod
    def forward(ctx, function, x, *parameters):
        ctx.function, ctx.x, ctx.parameters = function, x.detach(), parameters
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            output = ctx.function(x)
        return None, *torch.autograd.grad(output, (x, *ctx.parameters), grad)


def test_own_checkpoint_functions_are_refused_and_those_of_torch_exact():
    ways = {
        "none": lambda m, x: m.body(x),
        "own": lambda m, x: OwnCheckpoint.apply(m.body, x, *m.body.parameters()),
        "remedy": lambda m, x: checkpoint(m.body, x, use_reentrant=False),
    }
    body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model = Net(lambda m, x: ways[m.way](m, m.start(x)), start=nn.Linear(4, 4), body=body).double()
    model.way, x = "none", double(B, 4)
    expected = expected_direction(model, x)
    model.way = "own"
    with pytest.raises(RuntimeError, match=r"'body\.2' ran inside a backward.*use_reentrant=False"):
        captured_grad(model, x)
    model.way = "remedy"
    assert_close(captured_grad(model, x), expected)


def test_batch_normalisation_in_a_unit_is_refused_and_exact_frozen_or_converted():
    def make():
        model = own_type(lambda m, x: m.b(m.n(m.a(x))), a=nn.Linear(4, 4), n=nn.BatchNorm1d(4), b=nn.Linear(4, 2))
        as_unit(model)
        return model.double()

    x = double(B, 4)
    with pytest.raises(ValueError, match=r"'n' .*\.eval\(\).*convert_batch_norm.*outside"):
        captured_grad(make(), x, batch_norm="contribution")
    frozen = make()
    frozen.n.eval()
    assert_exact(frozen, x, batch_norm="contribution")
    assert_exact(rgd_ext.convert_batch_norm(make()), x)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("width", [0, 2])
def test_empty_parameters_are_let_be(width):
    empty = nn.Linear(width, 2 - width)
    model = Net(lambda m, x: m.b(torch.cat([x, m.a(x[:, :width])], 1)), a=empty, b=nn.Linear(6 - width, 3)).double()
    x = double(B, 4)
    model.c = nn.Parameter(torch.empty(0, 3, dtype=torch.double))
    got = captured_grad(model, x, loss=lambda y: loss_of(y) + model.c.sum())
    assert_close(got, expected_direction(model, x))


@pytest.mark.parametrize(
    "kind", [lambda: nn.LSTM(4, 3), lambda: nn.MultiheadAttention(4, 2)], ids=["lstm", "attention"]
)
def test_layers_called_for_each_sample_without_a_batch_are_exact_in_a_unit(kind):
    def forward(m, x):
        return torch.stack([m.a(*[sample] * (1 + 2 * isinstance(m.a, nn.MultiheadAttention)))[0] for sample in x])

    model, x = Net(forward, a=kind()).double(), double(B, 5, 4)
    with pytest.raises((TypeError, ValueError), match=r"register_rule\(enclosing, rgd_ext\.unit\).*batch_dim=None"):
        captured_grad(model, x)
    rgd_ext.register_rule(model, rgd_ext.unit)
    assert_exact(model, x)


@pytest.mark.parametrize("number", [3, 5])
def test_a_list_with_a_tensor_for_each_sample_is_refused_and_stacked_taken(number):
    """Three images have as many channels as there are images."""
    layers = {"c": nn.Conv2d(3, 4, 3), "b": nn.Linear(4, 2)}
    model = Net(lambda m, images: m.b(m.c(torch.stack(list(images))).mean((2, 3))), **layers).double()
    images = [double(3, 6, 6) for _ in range(number)]
    with pytest.raises(ValueError, match=r"one of a list.* stack them.*batch_dim=None"):
        captured_grad(model, images)
    captured_grad(model, torch.stack(images))


def test_lists_of_tensors_with_samples_first_are_taken():
    model = Net(lambda m, xs: m.a(xs[0]) + m.b(xs[1]), a=nn.Linear(4, 2), b=nn.Linear(3, 2))
    assert rgd_ext.verify(model, [torch.randn(B, 4), torch.randn(B, 3)]).samples == (0, B - 1)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor, self.scale = nn.Linear(4, 2), nn.Parameter(torch.zeros(1, 2))

    def forward(self, x):
        return self.act(x)

    def act(self, x):
        return self.actor(x) * self.scale.expand(len(x), 2).exp()


def test_methods_besides_forward_are_refused_and_forward_is_exact():
    policy = Policy().double()
    model, x = Net(lambda m, x: m.policy.act(x), policy=policy), double(B, 4)
    for method in (model, policy.act):
        captured = rgd_ext.precondition(model if method is model else policy, verify=False)
        with captured, pytest.raises(RuntimeError, match=r"scale'.*another method.*call that from forward"):
            loss_of(method(x)).backward()
    assert_exact(policy, x)
    assert_exact(Net(lambda m, x: m.policy(x), policy=policy), x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_and_padded_ones_taken(layout):
    model = Net(lambda m, x: m.b(m.a(x).sin()), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (3, 5, 2)], layout=layout)
    with rgd_ext.precondition(model), pytest.raises(TypeError, match="to_padded_tensor"):
        model(x)
    inside = Net(lambda m, x: m.a(torch.nested.as_nested_tensor(list(x), layout=torch.jagged)), a=nn.Linear(4, 2))
    with rgd_ext.precondition(inside), pytest.raises(TypeError, match=r"'a' got a nested tensor.*to_padded_tensor"):
        inside(torch.randn(3, 2, 4))
    assert rgd_ext.verify(model, torch.nested.to_padded_tensor(x, 0.0)).samples


def test_joined_graphs_are_told_to_come_one_at_a_time():
    def forward(m, x, edges, graph):
        messages = torch.zeros(len(x), 4).index_add(0, edges[1], m.a(x)[edges[0]]).relu()
        return torch.zeros(3, 4).index_add(0, graph, messages)

    model, graph = Net(forward, a=nn.Linear(3, 4)), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match="graphs that are joined.*batch_dim=None"):
        model(torch.randn(7, 3), torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 3, 6]]), graph)
    nodes = Net(lambda m, *inputs: m.b(forward(m, *inputs)[inputs[2]]), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"mixes samples.*one graph.*batch_dim=None"):
        rgd_ext.verify(nodes, torch.randn(7, 3), torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 3, 6]]), graph)


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight * self.mask


def test_weights_that_hooks_compute_are_refused_and_parametrised_ones_exact():
    for hook in (nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)):
        with pytest.raises(ValueError, match=r"'weight' in a hook.*parametriz"):
            rgd_ext.precondition(hook(nn.Linear(4, 5)))
    pruned = nn.Linear(4, 5).double()
    nn.utils.parametrize.register_parametrization(pruned, "weight", Masked(torch.rand(5, 4) > 0.5))
    assert_exact(pruned, double(B, 4))


def test_an_input_that_merges_the_batch_with_another_dimension_is_exact_in_a_unit():
    model = own_type(lambda m, x: m.a((x + 1).flatten()).view(len(x), -1), a=nn.Embedding(9, 3)).double()
    x = torch.randint(8, (B, 2))
    with pytest.raises(ValueError, match=r"from 'a' alone.*register_rule\(enclosing, rgd_ext\.unit\)"):
        captured_grad(model, x)
    rgd_ext.register_rule(model, rgd_ext.unit)
    assert_exact(model, x)


def test_units_that_need_more_than_one_sample_are_refused():
    model = own_type(lambda m, x: m.a(x.view(2, -1, 4)).view(-1, 3), a=nn.Linear(4, 3))
    as_unit(model)
    with pytest.raises(RuntimeError, match=r"fails for one sample .RuntimeError: shape.*batches of any size"):
        captured_grad(model, torch.randn(B, 4))


def test_complex_parameters_are_refused_and_pairs_exact():
    with pytest.raises(ValueError, match=r"complex64.*view_as_complex"):
        rgd_ext.precondition(nn.Linear(4, 2, dtype=torch.complex64))
    model = Net(lambda m, x: (torch.view_as_complex(m.p) * x).abs(), p=nn.Parameter(torch.randn(4, 2))).double()
    assert_exact(model, double(B, 4))


def test_functional_batch_normalisation_is_refused_and_exact_with_running_statistics():
    def forward(m, x):
        mean, variance = (torch.zeros(4).to(x), torch.ones(4).to(x)) if m.is_frozen else (None, None)
        return m.a(nn.functional.batch_norm(x, mean, variance, m.p, None, not m.is_frozen))

    model, x = Net(forward, a=nn.Linear(4, 2), p=nn.Parameter(torch.rand(4))).double(), double(B, 4)
    model.is_frozen = False
    with pytest.raises(ValueError, match=r"'Net\.p' of shape \(4,\) scales a batch norm.*running statistics"):
        captured_grad(model, x)
    model.is_frozen = True
    assert_exact(model, x)
