"""Layers inside a model: their input carries gradient, and in the usual case their forward runs from C++."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from capturing import Gain, captured_grad, double, flat_grad, loss_of
from models import Net
from oracle import assert_close, per_sample_gradients, weak_field
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

import rgd_ext
from rgd_ext._binary import _C
from rgd_ext.capture.rules import layer_norm


def gain_rule(module, inputs, output_grad):
    return {"gain": inputs[0] * output_grad}


rgd_ext.register_rule(Gain, gain_rule)


def behind(*layers):
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *layers).double()


def test_buffers_are_those_of_the_forward():
    class Scaled(Gain):
        def __init__(self):
            super().__init__()
            self.register_buffer("factor", torch.tensor(3.0))

        def forward(self, x):
            return super().forward(x) * self.factor

    rgd_ext.register_rule(Scaled, lambda module, inputs, output_grad: {"gain": inputs[0] * module.factor * output_grad})
    model, x = behind(Scaled()), double(5, 4)
    expected = weak_field(per_sample_gradients(model, loss_of, [x]))
    with rgd_ext.precondition(model):
        loss = loss_of(model(x))
        model[2].factor = torch.zeros(())
        loss.backward()
    assert_close(flat_grad(model), expected)


def test_mark_settles_a_batch_as_long_as_its_sequences():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(self.first(x).tanh().transpose(0, 1)).transpose(0, 1)

    model, x = SequenceFirst().double(), double(5, 5, 4)
    expected = weak_field(per_sample_gradients(model, loss_of, [x]))
    rgd_ext.mark(model.second, batch_dim=1)
    assert_close(captured_grad(model, x), expected)


def test_a_tensor_in_the_place_of_a_parameter_gets_its_own_gradient():
    model, x = behind(nn.Linear(4, 3)), double(5, 4)
    weight = double(3, 4).requires_grad_()
    with rgd_ext.precondition(model):
        loss_of(functional_call(model, {"2.weight": 2 * weight}, x)).backward()
    assert model[2].weight.grad is None
    expected = torch.autograd.grad(loss_of(functional_call(model, {"2.weight": 2 * weight}, x)), weight)[0]
    assert_close(weight.grad, expected)


def test_layer_without_trainable_parameters_is_left_alone():
    model, x = behind(nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 3)), double(5, 4)
    expected = weak_field(per_sample_gradients(model, loss_of, [x]))
    with rgd_ext.precondition(model):
        output = model(x)
        loss_of(output).backward()
    assert not any(p.requires_grad for p in model[2].parameters())
    assert_close(flat_grad(model), expected)


def test_batch_statistics_below_a_layer_are_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x)

    def rule(module, inputs, output_grad):
        return {"norm.weight": inputs[0] * output_grad, "norm.bias": output_grad}

    rgd_ext.register_rule(Block, rule)
    model = behind(Block()).eval()
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"'2\.norm' \(BatchNorm1d\)"):
        model.train()(double(5, 4))


def test_rule_that_has_no_hash():
    class Rule:
        __hash__ = None

        def __call__(self, module, inputs, output_grad):
            return gain_rule(module, inputs, output_grad)

    class Unhashed(Gain):
        pass

    rgd_ext.register_rule(Unhashed, Rule())
    model, x = behind(Unhashed()), double(5, 4)
    assert_close(captured_grad(model, x), weak_field(per_sample_gradients(model, loss_of, [x])))


@pytest.mark.parametrize("small", [64 << 10, 0])
def test_directions_may_be_changed_in_place(small, monkeypatch):
    monkeypatch.setattr("rgd_ext.capture.small.SMALL", small)
    layers = nn.LayerNorm((3, 4)), nn.LayerNorm(4), nn.Linear(4, 4), nn.Bilinear(4, 4, 2)
    model = nn.Sequential(*behind(*layers[:-1]), Net(lambda m, x: m.pair(x, x), pair=layers[-1])).double()
    x, factor = double(5, 3, 4), torch.ones((), requires_grad=True)
    with rgd_ext.precondition(model):
        for _ in range(2):  # planned in the first
            model.zero_grad()
            loss_of(model(x)).backward()
            for layer in layers:
                before, version = layer.bias.grad.clone(), layer.bias.grad._version
                layer.weight.grad.mul_(factor)
                assert layer.weight.grad.shape == layer.weight.shape
                assert torch.equal(layer.bias.grad, before)
                assert layer.bias.grad._version == version


def test_layer_that_also_runs_without_gradients():
    class WithTarget(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = self.body(x).tanh()
            with torch.no_grad():
                self.target = self.head(hidden)
            return self.head(hidden)

    model, x = WithTarget().double(), double(5, 4)
    expected = weak_field(per_sample_gradients(model, loss_of, [x]))
    assert_close(captured_grad(model, x), expected)
    assert not model.target.requires_grad


def test_forward_that_raises_leaves_parameters_trainable():
    model = behind(nn.Linear(3, 3))
    with rgd_ext.precondition(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(double(5, 4))
    assert all(p.requires_grad for p in model.parameters())


def test_output_that_is_no_tensor_is_refused():
    class Twice(Gain):
        def forward(self, x):
            return x * self.gain, x

    rgd_ext.register_rule(Twice, gain_rule)
    with rgd_ext.precondition(behind(Twice()).double()) as handle, pytest.raises(TypeError, match="gives a tuple"):
        handle.model(double(5, 4))


def test_tensor_in_a_list():
    class Listed(Gain):
        def forward(self, pair):
            return super().forward(pair[0])

    class Pack(nn.Module):
        def forward(self, x):
            return [x]

    rgd_ext.register_rule(Listed, gain_rule)
    model, x = behind(Pack(), Listed()), double(5, 4)
    assert_close(captured_grad(model, x), weak_field(per_sample_gradients(model, loss_of, [x])))


class Tagged(torch.Tensor):
    """A class of its own."""


def test_classes_of_outputs_stay():
    class Tagging(Gain):
        def forward(self, x):
            return super().forward(x).as_subclass(Tagged)

    rgd_ext.register_rule(Tagging, gain_rule)
    model, x = behind(Tagging()), double(5, 4)
    plain = behind(Gain())
    plain.load_state_dict(model.state_dict())
    with rgd_ext.precondition(model):
        output = model(x)
        loss_of(output.as_subclass(torch.Tensor)).backward()
    assert type(output) is Tagged
    assert_close(flat_grad(model), weak_field(per_sample_gradients(plain, loss_of, [x])))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by forward_ad itself
def test_tangent_that_comes_in_inside_is_refused():
    class WithTangent(nn.Module):
        def forward(self, x):
            return forward_ad.make_dual(x, torch.ones_like(x))

    model = behind(WithTangent(), nn.Linear(4, 3))
    with rgd_ext.precondition(model), forward_ad.dual_level(), pytest.raises(RuntimeError, match="paused"):
        model(double(5, 4))


@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
@pytest.mark.parametrize("layer", ["Linear", "LayerNorm", "wide LayerNorm", "RMSNorm", "GroupNorm"])
def test_small_layers_of_which_some_parameters_are_trained(layer, trained):
    layers = {
        "Linear": nn.Linear(4, 4),
        "LayerNorm": nn.LayerNorm(4),
        "wide LayerNorm": nn.LayerNorm((3, 4)),
        "RMSNorm": nn.RMSNorm(4, eps=0.1),
        "GroupNorm": nn.GroupNorm(3, 3),
    }
    model, x = behind(layers[layer], nn.Tanh(), nn.LayerNorm(4)), double(5, 3, 4)
    for name, parameter in model[2].named_parameters():
        nn.init.uniform_(parameter, 0.5, 2)
        parameter.requires_grad_(trained in (name, "both"))
    for epsilon in (rgd_ext.Spectral(0.5), rgd_ext.Rayleigh(0.5)):
        model.zero_grad()
        with rgd_ext.precondition(model, epsilon=epsilon):
            for _ in range(2):
                loss_of(model(x)).backward()
        expected = weak_field(per_sample_gradients(model, loss_of, [x]), type(epsilon).__name__)
        assert_close(flat_grad(model), 2 * expected)


def test_layer_whose_bias_is_not_asked_for():
    model, x = behind(nn.LayerNorm(4), nn.Linear(4, 3)), double(5, 4)
    weights = [p for name, p in model.named_parameters() if name != "2.bias"]
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward(inputs=weights)
    assert model[2].bias.grad is None
    model[2].bias.requires_grad_(False)
    assert_close(flat_grad(model), weak_field(per_sample_gradients(model, loss_of, [x])))


def test_small_layers_of_two_precisions():
    class Narrow(nn.Module):
        def forward(self, x):
            return x.float()

    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Narrow(), nn.LayerNorm(4), nn.Linear(4, 3))
    model[:2].double()
    x = double(5, 3, 4)
    whole = copy.deepcopy(nn.Sequential(*model[:2], *model[3:])).double()
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
    expected = weak_field(per_sample_gradients(whole, loss_of, [x]))
    assert model[1].weight.grad.dtype == torch.float64
    assert model[3].weight.grad.dtype == torch.float32
    assert_close(torch.cat([p.grad.flatten().double() for p in model.parameters()]), expected, torch.float32)


def test_small_layers_under_autocast(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, found = torch.randn(5, 3, 4), []
    for small in (64 << 10, 0):
        monkeypatch.setattr("rgd_ext.capture.small.SMALL", small)
        model.zero_grad()
        with rgd_ext.precondition(model), torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model(x).float())
            loss.backward()
        found.append(flat_grad(model))
    assert found[0].dtype == torch.float32
    assert_close(found[0], found[1])


@pytest.fixture
def layer_norm_record():
    if _C is None:
        pytest.skip("plain PyTorch forms one layer after another")
    layer = nn.LayerNorm(4)
    rule = partial(layer_norm, layer)
    return SimpleNamespace(kind="layer_norm", parameters=dict(layer.named_parameters()), rule=rule)


def test_small_layer_with_inputs_of_another_dtype_waits_for_its_rule(layer_norm_record):
    # As under autocast on a GPU, where norms widen their inputs.
    x, together = torch.randn(5, 4), _C.Together(each=1 << 10, all=1 << 20, share=3)
    assert together.take(layer_norm_record, x, x)
    assert not together.take(layer_norm_record, x.bfloat16(), x)
    assert len(together.contribute()) == 1


def test_small_layers_have_their_memory_in_every_backward(layer_norm_record):
    x = torch.randn(5, 4)
    together = _C.Together(each=2 * x.nbytes, all=5 * x.nbytes, share=3)
    for task in range(2):
        together.begin(task, 5)
        assert [together.take(layer_norm_record, x, x) for _ in range(3)] == [True, True, False]


def test_small_layer_with_many_weights_is_planned():
    if _C is None:
        pytest.skip("plain PyTorch forms one layer after another")
    model, x = behind(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 4)), double(2, 1, 4)
    assert 400 * 4 > 3 * (400 + 4)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(x)).backward()
        reasons = {layer.name: layer.why for layer in handle.plan().layers}
        assert reasons["2"] == reasons["4"] == "one vector per sample"
        loss_of(model[:2](double(2, 9, 4))).backward()
        assert [layer.why for layer in handle.plan().layers] == ["small: formed together with others"]
