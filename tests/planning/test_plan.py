"""Plans are made once for each shape, and `handle.plan()` shows them and leaves all else alone."""

import math

import pytest
import torch
from capturing import loss_of
from models import MODELS
from oracle import flat_grad
from planning_cases import STRATEGIES, counted_plans, model_and_inputs, only_strategy, strategies, with_rates
from torch import nn

import rgd_ext


def test_layers_are_planned_once_for_each_shape(monkeypatch):
    model, planned = nn.Conv2d(3, 4, 3), counted_plans(monkeypatch)
    with rgd_ext.precondition(model, verify=False):
        for batch, wanted in ((5, 1), (5, 1), (6, 2), (5, 2), (6, 2)):
            loss_of(model(torch.randn(batch, 3, 6, 6))).backward()
            assert len(planned) == wanted  # weights; for biases there is only one strategy


def test_another_dtype_is_planned_anew(monkeypatch):
    # The rates measured for two dtypes may favour two ways.
    with_rates(monkeypatch)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.randn(5, 3, 4, 4)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(x)).backward()
        single = handle.plan().bytes
        model.zero_grad()
        loss_of(model.double()(x.double())).backward()
        assert handle.plan().bytes == 2 * single


def test_backwards_without_the_gramian_take_the_strategy_that_is_faster_then(monkeypatch):
    # One in every three backwards needs it.
    with_rates(monkeypatch, gram=1e-9, stream=1e9, calls=1e9)
    model, ways = nn.Linear(30, 20, bias=False), []
    with rgd_ext.precondition(model, epsilon=rgd_ext.Spectral(0.5, every=3), memory_budget=math.inf) as handle:
        for _ in range(4):
            loss_of(model(torch.randn(5, 2, 30))).backward()
            ways += strategies(handle).values()
    assert ways == ["ghost", "materialise", "materialise", "ghost"]


def test_plan_leaves_model_gradients_and_random_numbers_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(6, 3, 8, 8)
    with rgd_ext.precondition(model, batch_norm="contribution") as handle:
        loss_of(model(x)).backward()
        stats, grad, buffers = handle.stats, flat_grad(model), [b.clone() for b in model.buffers()]
        state = torch.get_rng_state()
        plan = handle.plan(x)
        assert handle.stats is stats
        assert torch.equal(flat_grad(model), grad)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
        assert plan.layers == handle.plan().layers
    assert [layer.name for layer in plan.layers] == ["0", "1", "4"]
    assert plan.bytes == sum(layer.bytes for layer in plan.layers)
    assert plan.rgd_seconds > 0
    assert plan.sgd_seconds > 0
    table = str(plan).splitlines()
    assert table[0].split() == ["layer", "way", "ms", "MiB", "why"]
    assert table[1].split()[:2] == ["0", "materialise"]
    assert "SGD" in table[-1]


def test_plan_leaves_policies_and_collected_backwards_alone():
    model, x, asked = nn.Conv2d(1, 2, 3), torch.randn(4, 1, 9, 9), []
    with rgd_ext.precondition(model, epsilon=lambda stats: asked.append(stats) or 0.1) as handle:
        with handle.collect() as parts:
            handle.plan(x)
        assert (asked, parts) == ([], [])
    with rgd_ext.precondition(model, epsilon=rgd_ext.Spectral(0.5, every=2)) as handle:
        for wanted in (True, False, True):
            handle.plan(x)
            loss_of(model(x)).backward()
            assert (handle.stats.centred_gram is not None) == wanted


def test_plan_needs_a_backward_or_a_batch():
    model = nn.Linear(3, 2)
    with rgd_ext.precondition(model) as handle:
        with pytest.raises(RuntimeError, match="no backward yet"):
            handle.plan()
        with handle.paused(), pytest.raises(RuntimeError, match="records nothing"):
            handle.plan(torch.randn(4, 3))
        with pytest.raises(ValueError, match="no output"):
            rgd_ext.precondition(Detached()).plan(torch.randn(4, 3))


class Detached(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return super().forward(x).detach()


def test_a_plan_that_exceeds_the_budget_is_not_shown_as_that_of_the_last_backward():
    model, x = nn.Conv2d(3, 4, 3), torch.randn(5, 3, 6, 6)
    with rgd_ext.precondition(model, memory_budget=10) as handle:
        with pytest.raises(ValueError, match="memory_budget"):
            loss_of(model(x)).backward()
        with pytest.raises(RuntimeError, match="no backward yet"):
            handle.plan()


def test_the_direction_of_a_union_leaves_the_plan_of_the_last_backward():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)), torch.randn(5, 3, 8, 8)
    with rgd_ext.precondition(model) as handle:
        with handle.accumulate():
            loss_of(model(x)).backward()
            inside = handle.plan()
        assert handle.plan() == inside


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("name", ["tied", "convolutions", *MODELS])
def test_the_plan_for_a_batch_is_that_of_its_backward(monkeypatch, name, strategy):
    if strategy is not None:
        only_strategy(monkeypatch, strategy)
    model, inputs = model_and_inputs(name)
    with rgd_ext.precondition(model, batch_norm="contribution") as handle:
        planned = handle.plan(*inputs)
        loss_of(model(*inputs)).backward()
        assert planned.layers == handle.plan().layers


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_reason_for_a_strategy_is_that_of_the_batch_that_is_planned(order):
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(5)

        def forward(self, x, uses):
            for _ in range(uses):
                x = self.norm(x)
            return x

    with rgd_ext.precondition(Norms()) as handle:
        why = {uses: handle.plan(torch.randn(4, 5), uses).layers[0].why for uses in order}
    assert why[1] != why[2] == "added up over its uses"
