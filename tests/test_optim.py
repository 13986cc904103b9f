"""RGD keeps torch.optim.SGD's contract."""

import copy
import io
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


def train(model, optimizer, steps):
    for x, y in steps:
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_training_has_the_same_bits(every, stop):
    model, policy = mlp(), rgd_ext.Spectral(0.5, every=every)
    optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9, epsilon=policy)
    steps = [batch() for _ in range(9)]
    train(model, optimizer, steps[:stop])
    saved = reloaded([model.state_dict(), optimizer.state_dict()])
    resumed = mlp()
    other = rgd_ext.RGD(resumed, lr=0.5, momentum=0.1, epsilon=policy)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for net, opt in ((model, optimizer), (resumed, other)):
        train(net, opt, steps[stop:])
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


def test_a_state_dict_without_memory_lets_spectral_begin_anew():
    model = mlp()
    optimizer = rgd_ext.RGD(model, lr=0.1, epsilon=rgd_ext.Spectral(0.5, every=3))
    fresh = optimizer.state_dict()["preconditioner"]
    backward(model, *batch())
    assert optimizer.state_dict()["preconditioner"] != fresh
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state_dict()["preconditioner"] == fresh
    assert rgd_ext.RGD(mlp(), lr=0.1).state_dict().keys() == plain.state_dict().keys()


BAD_STATES = {
    "parameters": lambda state: torch.optim.SGD([nn.Parameter(torch.zeros(2))]).state_dict(),
    "handle": lambda state: {**state, "preconditioner": state},
    "number": lambda state: {**state, "preconditioner": {"largest_eigenvalue": {"batches": -1, "share": None}}},
    "share": lambda state: {**state, "preconditioner": {"largest_eigenvalue": {"batches": 1, "share": torch.ones(2)}}},
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_dict_that_does_not_fit_changes_nothing(name):
    model = mlp()
    optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9, epsilon=rgd_ext.Spectral(0.5, every=3))
    train(model, optimizer, [batch()])
    before = copy.deepcopy(optimizer.state_dict())
    bad = BAD_STATES[name](copy.deepcopy(before))
    bad["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"state"):
        optimizer.load_state_dict(bad)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


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


def test_a_second_optimizer_of_a_model_takes_the_capture_over():
    model = mlp()
    first = rgd_ext.RGD(model, lr=0.1)
    for refused in (lambda: rgd_ext.RGD(model, lr=-1.0), lambda: rgd_ext.RGD(model, 0.1, epsilon=rgd_ext.Trace(2.0))):
        with pytest.raises(ValueError, match=r"learning rate|fraction"):
            refused()
    backward(model, *batch())
    first.step()
    second = rgd_ext.RGD(model, lr=0.1, epsilon=0.0)
    assert rgd_ext.handle_of(model) is second.preconditioner
    with pytest.raises(RuntimeError, match=r"captured anew since.*newer optimizer"):
        first.step()
    x, y = batch()
    plain = copy.deepcopy(model)
    for net in (plain, model):
        net.zero_grad()
        backward(net, x, y)
    assert torch.equal(flat_grad(model), flat_grad(plain))
    second.step()


class Wrapper:
    """As the optimizers of Lightning: an instance of its own class and of the optimizer's."""

    def __init__(self, optimizer):
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def test_a_wrapper_that_is_a_subclass_has_the_handle():
    optimizer = rgd_ext.RGD(mlp(), lr=0.1, epsilon=rgd_ext.Spectral(0.5, every=3))
    wrapper = Wrapper(optimizer)
    assert wrapper.preconditioner is optimizer.preconditioner is not None
    assert wrapper.state_dict() == optimizer.state_dict()


def test_several_optimizers_of_one_model_share_a_capture():
    model = mlp()
    optimizers = [rgd_ext.RGD(model, lr=0.1), rgd_ext.RGD(model, lr=0.1)]
    with pytest.raises(RuntimeError, match=r"call rgd_ext\.precondition\(model\) once"):
        optimizers[0].step()
    rgd_ext.handle_of(model).remove()
    with rgd_ext.precondition(model) as handle:
        optimizers = [rgd_ext.RGD(model[n].parameters(), lr=0.1) for n in (0, 2)]
        with pytest.raises(ValueError, match=r"captured already.*RGD\(model\.parameters\(\), \.\.\.\)"):
            rgd_ext.RGD(model, lr=0.1)
        backward(model, *batch())
        for optimizer in optimizers:
            optimizer.step()
        assert rgd_ext.handle_of(model) is handle


def test_what_has_no_handle_or_state_is_refused():
    with pytest.raises(TypeError, match=r"module is a RGD: pass a torch\.nn\.Module"):
        rgd_ext.handle_of(rgd_ext.RGD(mlp(), lr=0.1))
    with pytest.raises(ValueError, match=r"a handle has no state \[1\]"):
        rgd_ext.precondition(mlp()).load_state_dict([1])


def test_the_handle_of_a_part_or_a_model():
    model = nn.ModuleList([mlp(), nn.Linear(2, 2)])
    assert rgd_ext.handle_of(model) is None
    with rgd_ext.precondition(model) as handle:
        assert rgd_ext.handle_of(model) is rgd_ext.handle_of(model[0][2]) is handle
        assert rgd_ext.handle_of(mlp()) is None
        with pytest.raises(ValueError, match=r"module '0' of the model is captured already.*handle_of\(module\)"):
            rgd_ext.precondition(nn.Sequential(model[0]))
        rgd_ext.handle_of(model[0]).remove()
        rgd_ext.precondition(nn.Sequential(model[0])).remove()
