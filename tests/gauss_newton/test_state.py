"""Training is resumed with the same bits, and parameter groups behave as those of torch.optim."""

import copy
import gc
import io
import weakref

import pytest
import torch
from fitting import flat, network, points
from oracle import assert_close
from torch import nn

import rgd_ext

WAYS = [{}, {"geodesic": True, "weight_decay": 1e-3}, {"adaptive": False, "momentum": 0.9, "lr": 0.5, "damping": 0.1}]


def batches(number):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(8, 2, dtype=torch.float64, generator=generator) for _ in range(number)]


def train(model, optimizer, data):
    for x in data:
        optimizer.step(lambda: (model(x) - x.prod(1, keepdim=True))[:, 0])  # noqa: B023  # called at once


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_resumed_training_has_the_same_bits(options):
    model, data = network(), batches(10)
    twin = copy.deepcopy(model)
    optimizer = rgd_ext.GaussNewton(model, **options)
    train(model, optimizer, data[:5])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data[5:])
    file.seek(0)
    state = torch.load(file)
    twin.load_state_dict(state["model"])
    resumed = rgd_ext.GaussNewton(twin, **options)
    resumed.load_state_dict(state["optimizer"])
    train(twin, resumed, data[5:])
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    assert resumed.param_groups[0]["damping"] == optimizer.param_groups[0]["damping"]


def test_schedulers_set_the_rate():
    model, x = network(), points(6)
    optimizer = rgd_ext.GaussNewton(model, adaptive=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    train(model, optimizer, [x])
    scheduler.step()
    before = flat(model.parameters())
    loss = optimizer.step(lambda: model(x)[:, 0])
    assert torch.equal(flat(model.parameters()), before)
    assert_close(loss, model(x).square().sum().detach() / 2)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to fit"):
        train(model, optimizer, [x])


def test_parameters_that_are_frozen_later_stay():
    model, x = network(), points(6)
    optimizer = rgd_ext.GaussNewton(model)
    train(model, optimizer, [x])
    model[0].requires_grad_(False)
    before = flat(model[0].parameters())
    train(model, optimizer, [x])
    assert torch.equal(flat(model[0].parameters()), before)
    model[0].requires_grad_(True)
    train(model, optimizer, [x])
    assert not torch.equal(flat(model[0].parameters()), before)


def test_the_gradients_of_the_user_are_not_touched():
    model, x = network(), points(6)
    optimizer = rgd_ext.GaussNewton(model)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    train(model, optimizer, [x])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_kept_between_steps():
    model, x = network(), points(6)
    optimizer = rgd_ext.GaussNewton(model, adaptive=False)
    train(model, optimizer, [x])
    assert not optimizer.state


def test_a_model_is_freed_after_a_step():
    def step():
        model, x = network(), points(6)
        optimizer = rgd_ext.GaussNewton(model)
        train(model, optimizer, [x])
        return weakref.ref(model)

    reference = step()
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.SGD])
def test_the_state_of_another_optimizer_is_refused(other):
    model = network()
    optimizer = rgd_ext.GaussNewton(model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"without damping.*of a GaussNewton"):
        optimizer.load_state_dict(other(model.parameters(), lr=0.1).state_dict())
    assert optimizer.state_dict() == before


def test_two_models_do_not_meet():
    first, second = network(), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    one, two = rgd_ext.GaussNewton(first), rgd_ext.GaussNewton(second)
    before = flat(second.parameters())
    train(first, one, batches(2))
    assert torch.equal(flat(second.parameters()), before)
    train(second, two, batches(2))
    assert not torch.equal(flat(second.parameters()), before)
