"""The registry's specs of layers, by which the operator `layer_grads` gives what the rules give."""

import pytest
import torch
from oracle import assert_close
from torch import nn

import rgd_ext
from rgd_ext.layers import registry
from rgd_ext.layers.registry import rule_for

B, T, N = 5, 3, 4
# Modules of each type with a spec, and inputs in whose normalisation eps has a part.
LAYERS = {
    "linear": (lambda: nn.Linear(N, 6), (B, T, N), 1.0),
    "linear without a bias": (lambda: nn.Linear(N, 6, bias=False), (B, T, N), 1.0),
    "layer norm": (lambda: nn.LayerNorm(N, eps=0.3), (B, T, N), 1.0),
    "layer norm without a bias": (lambda: nn.LayerNorm(N, bias=False), (B, T, N), 1e-2),
    "RMS norm": (lambda: nn.RMSNorm(N, eps=0.3), (B, T, N), 1.0),
    "RMS norm without eps": (lambda: nn.RMSNorm(N), (B, T, N), None),
    "group norm": (lambda: nn.GroupNorm(2, N, eps=0.3), (B, N, T), 1.0),
    "group norm of vectors": (lambda: nn.GroupNorm(2, N), (B, N), 1e-2),
}


def layer_and_input(name, dtype):
    build, shape, scale = LAYERS[name]
    return build().to(dtype), (scale or torch.finfo(dtype).eps ** 0.5) * torch.randn(shape, dtype=dtype)


def by_operator(module, x, output_grad):
    """Contributions by name, split from the columns that the operator gives."""
    spec, parameters = rule_for(module).spec_of(module), dict(module.named_parameters())
    arguments = [spec.kind], [output_grad], [x], [spec.groups], [spec.eps], ["bias" in parameters]
    columns = torch.ops.rgd_ext.layer_grads(*arguments).split([p.numel() for p in parameters.values()], 1)
    return {name: part.view(B, *parameters[name].shape) for name, part in zip(parameters, columns, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_spec_gives_the_contributions_of_the_rule(name, dtype):
    module, x = layer_and_input(name, dtype)
    output_grad = torch.randn_like(module(x))
    expected = rule_for(module).rule(module, (x,), output_grad)
    found = by_operator(module, x, output_grad)
    assert found.keys() == {parameter for parameter, _ in module.named_parameters()}
    for parameter, contributions in found.items():
        wanted = expected[parameter]
        assert_close(contributions, wanted if isinstance(wanted, torch.Tensor) else wanted.dense(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_spec_gives_contributions_that_sum_to_autograds_gradient(name, dtype):
    module, x = layer_and_input(name, dtype)
    output = module(x)
    output_grad = torch.randn_like(output)
    output.backward(output_grad)
    for parameter, contributions in by_operator(module, x, output_grad).items():
        assert_close(contributions.sum(0), module.get_parameter(parameter).grad, dtype)


def test_all_types_with_a_spec_are_tested():
    built = {type(build()) for build, *_ in LAYERS.values()}
    assert built == {kind for kind, layer_type in registry._registry.items() if layer_type.spec is not None}


class WithGain(nn.LayerNorm):
    def __init__(self):
        super().__init__(N)
        self.gain = nn.Parameter(torch.ones(N))


class WithParts(nn.Linear):
    def __init__(self):
        super().__init__(N, N)
        self.part = nn.Linear(N, N)


UNSERVED = {
    "several dimensions": lambda: nn.LayerNorm((T, N)),
    "several dimensions, RMS": lambda: nn.RMSNorm((T, N)),
    "no parameters": lambda: nn.RMSNorm(N, elementwise_affine=False),
    "another parameter": WithGain,
    "parameters inside": WithParts,
    "another rule": lambda: nn.Conv1d(N, N, 1),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_modules_that_the_operator_does_not_serve_have_no_spec(name):
    module = UNSERVED[name]()
    assert rule_for(module).spec_of(module) is None


def test_a_rule_of_the_users_takes_the_spec_of_its_type_away():
    class Own(nn.Linear):
        pass

    module = Own(N, N)
    assert rule_for(module).spec_of(module).kind == "linear"
    rgd_ext.register_rule(Own, lambda module, inputs, output_grad: {})
    try:
        assert rule_for(module).spec_of(module) is None
    finally:
        del registry._registry[Own]


def test_a_subclass_with_another_forward_is_of_no_known_type():
    class Scaled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    assert rule_for(Scaled(N)) is None


def test_a_spec_follows_the_dtype_of_the_weight():
    module = nn.RMSNorm(N)
    eps = [rule_for(module).spec_of(module.to(dtype)).eps for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    single, double = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    assert eps == [single, single, double]
