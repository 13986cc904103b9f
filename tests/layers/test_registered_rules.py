"""Rules that users register serve their own layers, and wrong answers of theirs are named."""

import copy

import pytest
import torch
from capturing import Gain, assert_exact, behind, captured_grad, double, expected_direction, gain_rule, loss_of
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext


def test_registered_rule_serves_its_type():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4))
            self.calls = 0

        def forward(self, x):
            return torch.sigmoid(x * self.gain)  # saves its result for the backward

    def rule(module, inputs, output_grad):
        module.calls += 1
        slope = torch.sigmoid(inputs[0] * module.gain)
        return {"gain": output_grad * slope * (1 - slope) * inputs[0]}

    rgd_ext.register_rule(Squares, rule)
    model = nn.Sequential(nn.Linear(4, 4), Squares()).double()
    assert_exact(model, double(6, 4))
    assert model[1].calls == 1


@pytest.mark.parametrize(
    "bad", [{}, {"gain": torch.zeros(4)}, {"gain": None}], ids=["missing", "wrong shape", "nothing"]
)
def test_rule_with_a_wrong_answer_is_named(bad):
    class Wrong(Gain):
        pass

    rgd_ext.register_rule(Wrong, lambda module, inputs, output_grad: bad)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"rule for 'Wrong' returned"):
        captured_grad(Wrong(), torch.randn(6, 4))


def test_contributions_of_the_batch_before_are_noticed():
    class Stale(Gain):
        memory = None

    def rule(module, inputs, output_grad):
        module.memory = inputs[0] * output_grad if module.memory is None else module.memory
        return {"gain": module.memory}

    rgd_ext.register_rule(Stale, rule)
    model = Stale()
    with rgd_ext.precondition(model):
        for _ in range(2):
            model(torch.randn(6, 4)).sum().backward()
        with pytest.raises(ValueError, match=r"rule for 'Stale' returned contributions of shape \(6, 4\).*\(5, 4\)"):
            model(torch.randn(5, 4)).sum().backward()


def test_a_rule_may_return_another_dtype():
    class Rounded(Gain):
        pass

    rgd_ext.register_rule(Rounded, lambda module, inputs, output_grad: {"gain": (inputs[0] * output_grad).bfloat16()})
    x = torch.randn(6, 4)
    expected = captured_grad(Gain(), x)
    model = Rounded()
    with rgd_ext.precondition(model, verify=False):  # which would find the rounding
        for _ in range(3):
            model.zero_grad()
            loss_of(model(x)).backward()
            assert model.gain.grad.dtype == torch.float32
            torch.testing.assert_close(model.gain.grad, expected, rtol=0.05, atol=1e-2 * expected.norm().item())


def test_subclass_with_a_parameter_the_rule_does_not_know_is_named():
    class Gained(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.gain = nn.Parameter(torch.ones(3))

    for shape in ((6, 4), (6, 2, 4)):
        with pytest.raises(RuntimeError, match=r"rule for 'Gained' returned contributions for.*'gain'"):
            captured_grad(Gained(), torch.randn(*shape))


def test_backward_called_under_autocast_runs_rules_in_full_precision():
    class Product(nn.Linear):
        """Its rule multiplies by itself."""

    rgd_ext.register_rule(Product, lambda module, inputs, output_grad: {"weight": output_grad.mT @ inputs[0]})
    model, x = Product(6, 3, bias=False), torch.randn(16, 5, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    with rgd_ext.precondition(model):
        loss = loss_of(model(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
    torch.testing.assert_close(flat_grad(model), expected)


def test_a_rule_sees_the_buffers_of_the_forward():
    class Scaled(Gain):
        def __init__(self):
            super().__init__()
            self.register_buffer("factor", torch.tensor(3.0))

        def forward(self, x):
            return super().forward(x) * self.factor

    rgd_ext.register_rule(Scaled, lambda module, inputs, output_grad: {"gain": inputs[0] * module.factor * output_grad})
    model, x = behind(Scaled()), double(5, 4)
    expected = expected_direction(model, x)
    with rgd_ext.precondition(model):
        loss = loss_of(model(x))
        model[2].factor = torch.zeros(())
        loss.backward()
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


def test_a_rule_needs_no_hash():
    class Rule:
        __hash__ = None

        def __call__(self, module, inputs, output_grad):
            return gain_rule(module, inputs, output_grad)

    class Unhashed(Gain):
        pass

    rgd_ext.register_rule(Unhashed, Rule())
    model, x = behind(Unhashed()), double(5, 4)
    assert_exact(model, x)


def test_output_that_is_no_tensor_is_refused():
    class Twice(Gain):
        def forward(self, x):
            return x * self.gain, x

    rgd_ext.register_rule(Twice, gain_rule)
    with rgd_ext.precondition(behind(Twice()).double()) as handle, pytest.raises(TypeError, match="gives a tuple"):
        handle.model(double(5, 4))
