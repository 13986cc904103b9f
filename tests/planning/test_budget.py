"""Plans keep within the memory budget, or say which one would do."""

import gc
import math

import pytest
import torch
from capturing import expected_direction, loss_of, with_lasting_memory, without_small_layers
from models import Net
from oracle import assert_close, flat_grad
from planning_cases import STRATEGIES, choice, fitted, model_and_inputs, only_strategy, strategies, with_rates
from torch import nn

import rgd_ext


def test_layers_that_save_most_bytes_per_second_give_way_to_the_budget(monkeypatch):
    with_rates(monkeypatch)
    layers = [
        choice("cheap to shrink", materialise=(1, 100), recompute=(2, 20)),
        choice("dear to shrink", materialise=(1, 100), recompute=(50, 20)),
        choice("fast and small", materialise=(9, 100), recompute=(2, 20)),
        choice("no choice", materialise=(1, 10)),
    ]
    assert fitted(layers, 230) == ["materialise", "materialise", "recompute", "materialise"]
    assert fitted(layers, 229) == ["recompute", "materialise", "recompute", "materialise"]
    assert "memory_budget" in layers[0].why
    assert fitted(layers, 70) == ["recompute", "recompute", "recompute", "materialise"]
    with pytest.raises(ValueError, match=r"memory_budget is 69 bytes.*memory_budget=70"):
        fitted(layers, 69)


def held_bytes(factors):
    """Of the storages that the factors of a backward keep."""
    storages = {}
    for factor in factors.values():
        for tensor in vars(factor).values():
            for part in vars(tensor).values() if hasattr(tensor, "inputs") else [tensor]:
                if isinstance(part, torch.Tensor):
                    storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["ResNet", "GPT"])
def test_planned_bytes_are_those_held(name, strategy, monkeypatch):
    model, inputs = model_and_inputs(name)
    only_strategy(monkeypatch, strategy)
    with rgd_ext.precondition(model) as handle:
        planned = handle.plan(*inputs).bytes
        with handle.collect() as parts:
            loss_of(model(*inputs)).backward()
    assert planned == pytest.approx(held_bytes(dict(parts[0].factors())), rel=0.15)


def test_budget_is_kept_and_exact(monkeypatch):
    with_rates(monkeypatch, convolution=1e-6)
    model, inputs = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Tanh(), nn.Conv2d(40, 40, 3)), [torch.randn(16, 3, 8, 8)]
    expected = expected_direction(model, *inputs)
    with rgd_ext.precondition(model, memory_budget=math.inf) as handle:
        free = handle.plan(*inputs).bytes
    with rgd_ext.precondition(model, memory_budget=free // 2) as handle:
        assert handle.plan(*inputs).bytes <= free // 2
        for _ in range(3):
            model.zero_grad()
            loss_of(model(*inputs)).backward()
            assert handle.plan().bytes <= free // 2
            assert_close(flat_grad(model), expected, torch.float32)


@pytest.mark.parametrize(("budget", "ways"), [(None, ["materialise", "recompute"]), (math.inf, ["materialise"] * 2)])
def test_by_default_a_layer_holds_three_times_what_it_is_given(budget, ways, monkeypatch):
    # Products cost time, memory does not.
    with_rates(monkeypatch, gram=1e9, stream=1e9, calls=1e9)
    narrow, wide = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 32, 3, padding=1, bias=False)
    model, inputs = nn.Sequential(narrow, nn.Tanh(), wide), [torch.randn(5, 3, 5, 5)]
    expected = expected_direction(model, *inputs)
    with rgd_ext.precondition(model, memory_budget=budget) as handle:
        loss_of(model(*inputs)).backward()
        assert list(strategies(handle).values()) == ways
    assert_close(flat_grad(model), expected, torch.float32)


@pytest.mark.parametrize(
    ("budget", "little", "number"),
    [(None, 1 << 20, 5), (math.inf, 1 << 20, 5), (None, 1 << 10, 0), (1_000_000, 1 << 20, 0)],
)
def test_little_memory_stays_between_steps_and_none_with_a_budget(budget, little, number, monkeypatch):
    with_lasting_memory(monkeypatch, little)
    without_small_layers(monkeypatch)
    with_rates(monkeypatch, gram=1e9, stream=1e9, calls=1e9)
    model, x = nn.Sequential(*[nn.Linear(19, 19, bias=False) for _ in range(5)]), torch.randn(5, 13, 19)

    def stay():
        return sum(type(t) is torch.Tensor and t.shape == (5, 19, 19) for t in gc.get_objects())

    with rgd_ext.precondition(model, memory_budget=budget) as handle:
        for _ in range(3):
            loss_of(model(x)).backward()
            assert stay() == number
        assert set(strategies(handle).values()) == {"materialise"}
        with handle.accumulate():
            loss_of(model(x)).backward()
            loss_of(model(x)).backward()
        assert stay() == number


def test_known_shapes_that_come_together_anew_are_planned_within_the_budget():
    model = Net(lambda m, x, y: m.a(x).tanh().mean(1) + m.b(y).tanh().mean(1), a=nn.Linear(9, 9), b=nn.Linear(9, 9))
    short, long = torch.randn(8, 2, 9), torch.randn(8, 40, 9)
    with rgd_ext.precondition(model) as handle:
        loss_of(model(long, long)).backward()
        least = handle.plan().bytes
    with rgd_ext.precondition(model, memory_budget=least - 1):
        loss_of(model(short, long)).backward()
        loss_of(model(long, short)).backward()
        with pytest.raises(ValueError, match=f"at least memory_budget={least}"):
            loss_of(model(long, long)).backward()


def test_a_budget_too_small_names_the_smallest_that_works_and_changes_nothing():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)), torch.randn(8, 3, 8, 8)
    with rgd_ext.precondition(model, memory_budget=100) as handle:
        for run in (lambda: loss_of(model(x)).backward(), lambda: handle.plan(x)):
            with pytest.raises(ValueError, match="memory_budget is 100 bytes") as caught:
                run()
        assert all(p.grad is None for p in model.parameters())
    least = int(str(caught.value).rpartition("memory_budget=")[2].partition(",")[0])
    for budget, works in ((least, True), (least - 1, False)):
        with rgd_ext.precondition(model, memory_budget=budget):
            if works:
                loss_of(model(x)).backward()
            else:
                with pytest.raises(ValueError, match=f"memory_budget={least}"):
                    loss_of(model(x)).backward()


@pytest.mark.parametrize(
    ("budget", "error"), [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1 GB", TypeError)]
)
def test_a_budget_is_a_positive_number_of_bytes(budget, error):
    with pytest.raises(error, match="memory_budget is"):
        rgd_ext.precondition(nn.Linear(2, 1), memory_budget=budget)
    with pytest.raises(error, match="memory_budget is"):
        rgd_ext.RGD(nn.Linear(2, 1), memory_budget=budget)
