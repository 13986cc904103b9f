"""Models may change between their capture, a forward and its backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from capturing import behind, captured_grad, double, expected_direction, guarded, loss_of
from models import Net, mlp
from oracle import assert_close, flat_grad
from torch import nn
from torch.func import functional_call

import rgd_ext


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
    assert_close(flat_grad(model), expected_direction(model, x))


def test_module_that_came_after_the_capture_is_refused():
    model = Net(lambda m, x: m.head(m.body(x).tanh()), body=nn.Linear(4, 5), head=nn.Linear(5, 3))
    with rgd_ext.precondition(model):
        model.head = nn.Linear(5, 2)
        with pytest.raises(ValueError, match=r"'head\.weight' came into the model after its capture"):
            model(torch.randn(6, 4))


def test_parameters_assigned_by_load_state_dict_are_captured():
    def state(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 3)), torch.randn(5, 4, 6, 6)
    with rgd_ext.precondition(model, memory_budget=float("inf")) as handle:
        for _ in range(3):
            model.load_state_dict(state(model), assign=True)
            rgd_ext.RGD(model.parameters(), lr=0.1)
            loss_of(model(x)).backward()
        assert [layer.name for layer in handle.plan().layers] == ["0", "2"]
        assert guarded(handle) == set(map(id, model.parameters()))
    assert_close(flat_grad(model).double(), expected_direction(model, x), torch.float32)


def test_a_layer_thawed_in_a_forward_that_does_not_use_it_is_captured_in_the_next():
    model = Net(lambda m, x: m.b(m.a(x)) if m.is_deep else m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 3)).double()
    x, model.is_deep = torch.randn(6, 4).double(), False
    model.b.requires_grad_(False)
    with rgd_ext.precondition(model):
        model.b.requires_grad_(True)
        model(x)
        model.is_deep = True
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected_direction(model, x))


def test_parameter_replaced_after_the_capture_is_captured():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double(), torch.randn(6, 4, dtype=torch.float64)
    with rgd_ext.precondition(model):
        model[0].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected_direction(model, x))


def test_functional_call_differentiates_its_own_values():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(5, 4)
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.autograd.grad(loss_of(model(x)), list(model.parameters()))
    with rgd_ext.precondition(model):
        loss_of(torch.func.functional_call(model, values, (x,))).backward()
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close([v.grad for v in values.values()], list(expected))


def test_a_tensor_in_the_place_of_a_parameter_gets_its_own_gradient():
    model, x = behind(nn.Linear(4, 3)), double(5, 4)
    weight = double(3, 4).requires_grad_()
    with rgd_ext.precondition(model):
        loss_of(functional_call(model, {"2.weight": 2 * weight}, x)).backward()
    assert model[2].weight.grad is None
    expected = torch.autograd.grad(loss_of(functional_call(model, {"2.weight": 2 * weight}, x)), weight)[0]
    assert_close(weight.grad, expected)


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


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("change", ["no bias", "new weight"])
def test_a_layer_that_gets_another_dictionary_of_parameters_is_exact(change, verify):
    model, x = behind(nn.Linear(4, 3)), double(6, 4)
    with rgd_ext.precondition(model, verify=verify):
        loss_of(model(x)).backward()
        model.zero_grad()
        layer, bias = model[-1], model[-1].bias
        layer.__setstate__({**vars(layer), "_parameters": dict(layer._parameters)})
        if change == "no bias":
            layer.bias = None
        else:
            layer.weight = nn.Parameter(double(3, 4))
        loss_of(model(x)).backward()
    found = flat_grad(model)
    model.zero_grad()
    assert_close(found, expected_direction(model, x))
    assert change == "new weight" or bias.grad is None
