"""RGD keeps torch.optim.SGD's contract."""

import copy
import pickle

import pytest
import torch
from models import mlp
from oracle import assert_close, flat, flat_grad
from torch import nn

import rgd_ext

OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "dampening": 0.1},
    {"maximize": True},
    {"foreach": True, "momentum": 0.9},
    {"foreach": False, "weight_decay": 0.1},
    {"fused": True, "momentum": 0.9},
    {"differentiable": False},
]


def batch():
    return torch.randn(8, 6), torch.randint(3, (8,))


def backward(model, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step_is_sgd_along_the_direction(options):
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = rgd_ext.RGD(model, lr=0.1, **options)
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, **options)
    for _ in range(5):
        optimizer.zero_grad()
        backward(model, *batch())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_epsilon_zero_is_sgd_bitwise():
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = rgd_ext.RGD(model, 0.1, 0.9, epsilon=0.0)
    reference = torch.optim.SGD(twin.parameters(), 0.1, 0.9)
    for _ in range(20):
        x, y = batch()
        for net, opt in ((model, optimizer), (twin, reference)):
            opt.zero_grad()
            backward(net, x, y)
            opt.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_identical_samples_are_sgd():
    model, (x, y) = mlp(), batch()
    x, y = x[:1].expand(8, -1), y[:1].expand(8)
    backward(model, x, y)
    expected = flat_grad(model).clone()
    optimizer = rgd_ext.RGD(model, 0.1)
    optimizer.zero_grad()
    backward(model, x, y)
    assert_close(flat_grad(model), expected)
    assert optimizer.preconditioner.stats.epsilon == 0


def test_groups_schedulers_and_hooks():
    model = mlp()
    handle = rgd_ext.precondition(model)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": list(model[2:].parameters())}]
    optimizer = rgd_ext.RGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, *batch())
    optimizer.step()
    scheduler.step()
    assert calls == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] < 0.5
    for p, q, lr in zip(model.parameters(), before, [0.5, 0.5, 0.1, 0.1, 0.1, 0.1], strict=True):
        assert torch.allclose(p, q - lr * p.grad)
    assert optimizer.preconditioner is None
    handle.remove()


def test_closures():
    model, data = mlp(), batch()
    optimizer = rgd_ext.RGD(model, lr=0.1)

    def closure():
        optimizer.zero_grad()
        return backward(model, *data)

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_state_dict_round_trip():
    model = mlp()
    optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9)
    steps = [batch() for _ in range(6)]
    for x, y in steps[:3]:
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed = mlp()
    other = rgd_ext.RGD(resumed, lr=0.5, momentum=0.1)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for x, y in steps[3:]:
        for net, opt in ((model, optimizer), (resumed, other)):
            opt.zero_grad()
            backward(net, x, y)
            opt.step()
    assert torch.equal(flat(model.parameters()), flat(resumed.parameters()))


def test_state_dict_loads_into_sgd_and_back():
    model = mlp()
    optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9)
    backward(model, *batch())
    optimizer.step()
    plain = torch.optim.SGD(model.parameters(), lr=0.2)
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_copies_of_the_optimizer():
    model = mlp()
    optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9)
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert clone.param_groups[0]["lr"] == 0.1
        assert clone.preconditioner is None


@pytest.mark.parametrize("build", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_optimizer_works_on_preconditioned_gradients(build):
    model, data = mlp(), batch()
    optimizer = build(model.parameters(), lr=0.01)
    with rgd_ext.precondition(model):
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            losses.append(backward(model, *data).item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert losses[-1] < losses[0]


def test_frozen_parameters_stay():
    model = mlp()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = rgd_ext.RGD(model, lr=0.1)
    backward(model, *batch())
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    backward(model, *batch())
    assert model[0].weight.grad is not None


def test_parameters_that_were_never_captured_are_refused():
    model = mlp()
    with pytest.raises(ValueError, match=r"never captured.*RGD\(model, \.\.\.\)"):
        rgd_ext.RGD(model.parameters(), lr=0.1)
    optimizer = rgd_ext.RGD(model, lr=0.1)
    with pytest.raises(ValueError, match="never captured"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    assert len(optimizer.param_groups) == 1


def test_a_set_of_parameters_has_no_order():
    model = mlp()
    with rgd_ext.precondition(model), pytest.raises(TypeError, match="ordered collections"):
        rgd_ext.RGD([{"params": set(model.parameters())}], lr=0.1)


def test_options_of_the_capture_belong_to_the_capture():
    model = mlp()
    with rgd_ext.precondition(model), pytest.raises(TypeError, match="epsilon with parameters"):
        rgd_ext.RGD(model.parameters(), lr=0.1, epsilon=0.5)


def test_a_refused_optimizer_leaves_the_model_uncaptured():
    model = mlp()
    with pytest.raises(ValueError, match="learning rate"):
        rgd_ext.RGD(model, lr=-1.0)
    with pytest.raises(ValueError, match="fraction"):
        rgd_ext.RGD(model, lr=0.1, epsilon=rgd_ext.Trace(2.0))
    assert all("forward" not in m.__dict__ for m in model.modules())
    rgd_ext.RGD(model, lr=0.1)
