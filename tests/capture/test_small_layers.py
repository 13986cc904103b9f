"""Small layers wait for the end of the backward, where their contributions are formed together."""

import copy

import pytest
import torch
from capturing import (
    B,
    Gain,
    assert_exact,
    behind,
    collector,
    double,
    expected_direction,
    loss_of,
    register_type,
    skip_without_common_operator,
    use_of_layer_norm,
    without_small_layers,
)
from models import Net
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext
from rgd_ext.layers.registry import LayerType
from rgd_ext.layers.spec import LayerSpec


@pytest.mark.parametrize(
    ("places", "memory_budget", "is_late"), [(1, None, True), (1, 1e6, False), (2000, None, False)]
)
def test_rules_of_small_layers_wait_for_the_end_of_the_backward(places, memory_budget, is_late):
    class Noted(Gain):
        pass

    events = []

    def rule(module, inputs, output_grad):
        events.append("rule")
        return {"gain": (inputs[0] * output_grad).sum(1)}

    rgd_ext.register_rule(Noted, rule)
    model = nn.Sequential(Noted(), nn.Tanh(), Noted())
    x = torch.randn(6, places, 4, requires_grad=True)
    expected = weak_field(per_sample_gradients(copy.deepcopy(model).double(), loss_of, [x.detach().double()]))
    x.register_hook(lambda grad: events.append("backward"))
    with rgd_ext.precondition(model, memory_budget=memory_budget, verify=False):
        loss_of(model(x)).backward()
    assert events == (["backward", "rule", "rule"] if is_late else ["rule", "rule", "backward"])
    assert_close(flat_grad(model).double(), expected, torch.float32)


def test_what_waits_is_forgotten_with_a_backward_that_fails():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double(), double(6, 4)
    expected = expected_direction(model, x)

    def fail(grad):
        raise OverflowError

    with rgd_ext.precondition(model):
        output = model(x.requires_grad_())
        hook = x.register_hook(fail)
        with pytest.raises(OverflowError):
            (7 * loss_of(output)).backward()
        hook.remove()
        assert all(p.grad is None for p in model.parameters())
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected)


@pytest.mark.parametrize("are_small", [True, False], ids=["65536", "0"])
def test_directions_may_be_changed_in_place(are_small, monkeypatch):
    if not are_small:
        without_small_layers(monkeypatch)
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


@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
@pytest.mark.parametrize("layer", ["Linear", "LayerNorm", "wide LayerNorm", "RMSNorm", "GroupNorm"])
def test_small_layers_of_which_some_parameters_are_trained_match_the_oracle(layer, trained):
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


def test_layer_whose_bias_is_not_asked_for_gets_the_direction_of_its_weight():
    model, x = behind(nn.LayerNorm(4), nn.Linear(4, 3)), double(5, 4)
    weights = [p for name, p in model.named_parameters() if name != "2.bias"]
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward(inputs=weights)
    assert model[2].bias.grad is None
    model[2].bias.requires_grad_(False)
    assert_close(flat_grad(model), expected_direction(model, x))


def test_small_layers_of_two_precisions_match_the_oracle():
    class Narrow(nn.Module):
        def forward(self, x):
            return x.float()

    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Narrow(), nn.LayerNorm(4), nn.Linear(4, 3))
    model[:2].double()
    x = double(5, 3, 4)
    whole = copy.deepcopy(nn.Sequential(*model[:2], *model[3:])).double()
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
    expected = expected_direction(whole, x)
    assert model[1].weight.grad.dtype == torch.float64
    assert model[3].weight.grad.dtype == torch.float32
    assert_close(torch.cat([p.grad.flatten().double() for p in model.parameters()]), expected, torch.float32)


def test_small_layers_give_the_same_direction_together_and_one_by_one_under_autocast(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, found = torch.randn(5, 3, 4), []
    for are_small in (True, False):
        if not are_small:
            without_small_layers(monkeypatch)
        model.zero_grad()
        with rgd_ext.precondition(model), torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model(x).float())
            loss.backward()
        found.append(flat_grad(model))
    assert found[0].dtype == torch.float32
    assert_close(found[0], found[1])


def test_small_layer_with_inputs_of_another_dtype_waits_for_its_rule():
    # As under autocast on a GPU, where norms widen their inputs.
    x, layers, use = torch.randn(5, 4), collector(each=1 << 10, together=1 << 20), use_of_layer_norm()
    assert layers.take_small(use, x, x)
    assert not layers.take_small(use, x.bfloat16(), x)
    assert len(layers.gradients()) == 1


def test_small_layers_have_their_memory_in_every_backward():
    x, use = torch.randn(5, 4), use_of_layer_norm()
    for _ in range(2):
        layers = collector(each=2 * x.nbytes, together=5 * x.nbytes)
        assert [layers.take_small(use, x, x) for _ in range(3)] == [True, True, False]


def test_small_layer_with_many_weights_is_planned():
    skip_without_common_operator()
    model, x = behind(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 4)), double(2, 1, 4)
    assert 400 * 4 > 3 * (400 + 4)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(x)).backward()
        reasons = {layer.name: layer.why for layer in handle.plan().layers}
        assert reasons["2"] == reasons["4"] == "one vector per sample"
        loss_of(model[:2](double(2, 9, 4))).backward()
        assert [layer.why for layer in handle.plan().layers] == ["small: formed together with others"]


@pytest.mark.parametrize(
    ("build", "change"),
    [
        (lambda: nn.LayerNorm(4), {"eps": 0.5}),
        (lambda: nn.RMSNorm(4), {"eps": 0.5}),
        (lambda: nn.GroupNorm(2, 4), {"eps": 0.5}),
        (lambda: nn.GroupNorm(2, 4), {"num_groups": 1}),
    ],
    ids=["layer norm", "RMS norm", "group norm", "groups"],
)
def test_a_norm_that_is_changed_after_the_capture_is_exact(build, change):
    model, x = behind(build()), double(B, 4)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
        model.zero_grad()
        for name, value in change.items():
            setattr(model[-1], name, value)
        loss_of(model(x)).backward()
    found = flat_grad(model)
    model.zero_grad()
    assert_close(found, expected_direction(model, x))


def test_a_layer_norm_that_gets_more_dimensions_after_the_capture_is_exact():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double(), double(B, 3, 4)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
        model.zero_grad()
        model[1].normalized_shape = (3, 4)
        for name in ("weight", "bias"):
            setattr(model[1], name, nn.Parameter(double(3, 4)))
        loss_of(model(x)).backward()
    found = flat_grad(model)
    model.zero_grad()
    assert_close(found, expected_direction(model, x))


class ScaleByRms(nn.Module):
    """An RMS norm that has its eps under another name."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(4)), 0.3

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * self.weight


def test_a_spec_may_come_from_a_module_that_has_no_eps(monkeypatch):
    def spec(module):
        return LayerSpec("rms_norm", eps=module.variance_epsilon)

    def rule(module, inputs, output_grad):
        (x,), norm = inputs, nn.functional.rms_norm
        return {"weight": norm(x, x.shape[-1:], eps=module.variance_epsilon) * output_grad}

    register_type(monkeypatch, ScaleByRms, LayerType(rule, 1, spec=spec))
    assert_exact(behind(ScaleByRms()), double(B, 4))
