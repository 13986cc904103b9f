"""A verification leaves no trace in the model, its objects, random numbers, gradients or memory."""

import copy
import random
import warnings
from collections import UserDict, namedtuple
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from capturing import B, captured_grad, less_the_mean, loss_of
from models import MODELS, Net, mlp, two_layers
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext


class Traces(nn.Module):
    """A forward that leaves a trace wherever it can."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("average", torch.zeros(4))
        self.count, self.kept, self.log, self.cache = 0, torch.zeros(4), [], {"last": torch.zeros(4)}
        self.state, self.nested = {"calls": 0}, {"lists": [[]], "arrays": (numpy.zeros(1),)}
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x):
        self.count += 1
        self.state["calls"] += 1
        self.log.append(self.count)
        self.nested["lists"][0].append(1)
        self.nested["arrays"][0][0] += 1
        z = F.dropout(self.norm(self.a(x)), 0.1) * random.random() * numpy.random.rand()
        with torch.no_grad():
            self.average += z.mean(0)
            self.kept += z.mean(0)
            self.frozen.mul_(0.9).add_(z.mean(0))
            self.cache["last"] += z.mean(0)
        self.last = z.detach()
        return self.b(z)


def seeded(verify, hooks=None):
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    model, calls = Traces(), []
    for module in (model, model.a):
        for register in hooks or ():
            getattr(module, register)(lambda *_: calls.append(1))
    optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9, batch_norm="contribution", verify=verify)
    data = torch.randn(3, B, 5)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, calls, data


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_training_has_the_same_bits_and_state():
    hooks = "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"
    (model, calls, data), (other, plain_calls, plain_data) = seeded(True, hooks), seeded(False, hooks)
    assert torch.equal(data, plain_data)
    assert len(calls) == len(plain_calls) == 18
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert (model.count, model.log, model.state) == (3, [1, 2, 3], {"calls": 3})
    assert (model.nested["lists"], model.nested["arrays"][0][0]) == ([[1, 1, 1]], 3)
    assert torch.equal(model.kept, other.kept)
    assert torch.equal(model.cache["last"], other.cache["last"])
    assert torch.equal(model.last, other.last)
    states = []
    for verify in (True, False):
        seeded(verify)
        states.append((torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()))
    assert states[0] == states[1]


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_train_with_the_same_bits(name):
    build, inputs_of = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build(), inputs_of(5)
    trained = []
    for verify in (True, False):
        copied = copy.deepcopy(model)
        optimizer = rgd_ext.RGD(copied, lr=0.1, verify=verify)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(copied(*inputs)).backward()
            optimizer.step()
        trained.append(flat_grad(copied))
    assert torch.equal(*trained)


def test_verifying_leaves_gradients_stats_and_plan_alone():
    model, x = mlp(), torch.randn(B, 6)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(x)).backward()
        grad, stats, plan = [p.grad for p in model.parameters()], handle.stats, str(handle.plan())
        kept = [g.clone() for g in grad]
        rgd_ext.verify(model, torch.randn(2, 6))
        assert all(p.grad is g for p, g in zip(model.parameters(), grad, strict=True))
        assert all(map(torch.equal, grad, kept))
        assert handle.stats is stats
        assert str(handle.plan()) == plan


def test_buffers_are_the_same_objects_even_after_an_error():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), Net(less_the_mean, a=nn.Linear(4, 4), b=nn.Linear(4, 2)))
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with rgd_ext.precondition(model, batch_norm="contribution"):
        attributes = [dict(vars(module)) for module in model.modules()]
        with pytest.raises(ValueError, match="mixes samples"):  # besides the batch normalisation
            model(torch.randn(B, 5))
        for name, buffer in model.named_buffers():
            assert buffer is before[name][0]
            assert torch.equal(buffer, before[name][1])
        assert [dict(vars(module)) for module in model.modules()] == attributes


def test_global_hooks_see_what_the_user_calls():
    calls, model = [], mlp()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        with rgd_ext.precondition(model):
            model(torch.randn(B, 6))
    finally:
        hook.remove()
    assert len(calls) == 6


def test_a_forward_that_needs_its_hooks_is_verified_with_them():
    model, calls = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(3, 2)), []
    model[1].register_forward_hook(lambda module, inputs, output: calls.append(1) or output[:, :3])
    assert rgd_ext.verify(model, torch.randn(B, 5)).samples


def test_a_proof_takes_little_more_memory_than_a_step():
    from bench.measuring.memory import extra_memory
    from bench.verification import first_step

    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 1000))
    x, y = torch.randint(50, (16, 32)), torch.randint(1000, (16, 32))
    first_step(model, x, y, verify=True)
    proven, plain = (extra_memory(partial(first_step, model, x, y, verify), "cpu") for verify in (True, False))
    assert proven < 1.15 * plain


def test_nothing_is_called_once_proven():
    model, calls = Net(lambda m, x: calls.append(1) or m.a(x), a=nn.Linear(5, 4)), []
    with rgd_ext.precondition(model):
        model(torch.randn(B, 7, 5))
        del calls[:]
        for length in (7, 8, 9):  # other lengths are not another kind
            model(torch.randn(B, length, 5))
    assert len(calls) == 3


def test_the_number_of_proofs_is_bounded():
    calls = []
    model = Net(lambda m, x: calls.append(1) or m.a(x), a=nn.Linear(5, 4))
    with rgd_ext.precondition(model):
        for size in range(2, 30):
            model(torch.randn(size, 5))
    assert len(calls) < 28 + 8 * 6


def test_the_number_of_proofs_that_leave_something_open_is_bounded():
    calls = []
    model = Net(lambda m, x: calls.append(1) or m.a(x) + 0 * m.b(x), a=nn.Linear(5, 4), b=nn.Linear(5, 4))
    with rgd_ext.precondition(model):
        for size in range(2, 100):
            model(torch.randn(size, 5))
        del calls[:]
        for size in range(2, 100):
            model(torch.randn(size, 5))
    assert len(calls) == 98


class Meter:
    def __init__(self):
        self.count, self.values, self.random = 0, [], random.Random(1)

    def update(self, value):
        self.count += 1
        self.values.append(value + self.random.random())


class Slotted:
    __slots__ = ("count", "unset")

    def __init__(self):
        self.count = 0


class OwnObjects(nn.Module):
    """A forward that changes objects of the model that are no buffers."""

    def __init__(self):
        super().__init__()
        self.a, self.meter, self.norms = nn.Linear(5, 4), Meter(), [nn.BatchNorm1d(4, affine=False)]
        self.python, self.numpy, self.legacy = (
            random.Random(0),
            numpy.random.default_rng(0),
            numpy.random.RandomState(0),
        )
        self.generators = {"noise": [torch.Generator().manual_seed(0)]}
        self.namespace, self.slotted = SimpleNamespace(counts=[]), Slotted()
        self.loop: list = [0]
        self.loop.append(self.loop)
        self.pair = namedtuple("Pair", "left right")([], UserDict(count=0))

    def forward(self, x):
        z = self.a(x)
        self.norms[0](z.detach())
        self.pair.left.append(1)
        self.loop[1][0] += 1
        self.namespace.counts.append(1)
        self.slotted.count += 1
        self.pair.right["count"] += 1
        noise = torch.rand(4, generator=self.generators["noise"][0])
        self.meter.update(self.python.random() + self.numpy.random() + self.legacy.rand() + noise.sum().item())
        return z * self.meter.values[-1]


def test_objects_and_generators_of_the_model_change_once_per_call():
    found = []
    for verify in (True, False):
        torch.manual_seed(0)
        model = OwnObjects()
        with rgd_ext.precondition(model, verify=verify):
            for _ in range(2):
                model(torch.randn(B, 5)).sum().backward()
        assert (model.loop[0], model.namespace.counts, model.slotted.count) == (2, [1, 1], 2)
        assert (model.meter.count, model.norms[0].num_batches_tracked, model.pair) == (2, 2, ([1, 1], {"count": 2}))
        found.append((model.meter.values, flat_grad(model).tolist()))
    assert found[0] == found[1]


MOVES = {
    "in place": lambda p, value: p.copy_(value),
    "data in place": lambda p, value: p.data.copy_(value),
    "data": lambda p, value: setattr(p, "data", value),
}


@pytest.mark.parametrize("how", MOVES)
def test_a_teacher_that_follows_is_moved_once(how):
    def forward(m, x):
        with torch.no_grad():
            for teacher, student in zip(m.teacher.parameters(), m.student.parameters(), strict=True):
                MOVES[how](teacher, teacher * 0.9 + student * 0.1)
            target = m.teacher(x)
        return m.student(x) - target

    model = Net(forward, student=nn.Linear(5, 4), teacher=nn.Linear(5, 4), frozen=nn.Linear(50, 40))
    for part in (model.teacher, model.frozen):
        part.requires_grad_(False)
    expected = 0.9 * model.teacher.weight + 0.1 * model.student.weight
    with rgd_ext.precondition(model):
        model(torch.randn(B, 5)).sum().backward()
    assert torch.equal(model.teacher.weight, expected)


@pytest.mark.parametrize("how", MOVES)
def test_weights_that_a_forward_changes_are_changed_once(how):
    def forward(m, x):
        with torch.no_grad():
            MOVES[how](m.b.weight, m.b.weight * 0.9)
        return m.b(m.a(x).tanh())

    model = two_layers(forward)
    expected = 0.9 * model.b.weight.detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*its forward changes parameters")
        found = captured_grad(model, x := torch.randn(B, 5))
    assert torch.equal(model.b.weight, expected)
    model._forward = lambda m, x: m.b(m.a(x).tanh())
    model.zero_grad()
    assert_close(found, captured_grad(model, x))


def test_what_a_forward_freezes_is_as_it_left_it():
    def forward(m, x):  # the next one at every call
        places = [getattr(m, name).weight for name in "abc"]
        (frozen,) = (n for n, p in enumerate(places) if not p.requires_grad)
        places[frozen].requires_grad_()
        places[(frozen + 1) % 3].requires_grad_(False)
        return m.c(m.b(m.a(x)))

    model = Net(forward, a=nn.Linear(5, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 5))
    model.a.weight.requires_grad_(False)
    with rgd_ext.precondition(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*could not be verified")
        model(torch.randn(B, 5))
    assert not model.b.weight.requires_grad


def test_arguments_that_a_forward_changes_are_changed_once():
    def forward(m, x, shared):
        return m.a(x) * shared.add_(1)

    model, shared = Net(forward, a=nn.Linear(5, 4)), torch.zeros(4)
    with rgd_ext.precondition(model):
        model(torch.randn(B, 5), shared).sum().backward()
    assert torch.equal(shared, torch.ones(4))


def test_a_proof_that_cannot_begin_changes_nothing(monkeypatch):
    def fail(*_):
        raise NotImplementedError("gone")

    monkeypatch.setattr(torch._C._autograd, "_top_saved_tensors_default_hooks", fail)
    model, hooks = mlp(), nn.modules.module._global_forward_hooks
    model[0].register_forward_hook(lambda *_: None)
    with rgd_ext.precondition(model), pytest.warns(UserWarning, match="gone"):
        model(torch.randn(B, 6))
    assert nn.modules.module._global_forward_hooks is hooks
    assert torch.is_autocast_cache_enabled()
