"""Trainings by Lightning with `RGDStrategy` in two processes are those of one process that takes all samples."""

import importlib
import sys

import pytest
import torch
from torch.utils.data import DistributedSampler
from trainers import BATCH, DATA, RATE, VALIDATION, assert_same_as, mlp, policy, run_two, union_step

import rgd_ext

pytest.importorskip("lightning")

from rgd_ext.integrations.lightning import RGDStrategy  # needs Lightning


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_two(tmp_path_factory, "lightning_program.py")


def batches_of(epoch):
    """The batches of both processes, in the order of the steps."""
    found = []
    for rank in range(2):
        sampler = DistributedSampler(DATA, 2, rank)
        sampler.set_epoch(epoch)
        found.append([DATA[index.tolist()] for index in torch.tensor(list(sampler)).split(BATCH)])
    return [batch for both in zip(*found, strict=True) for batch in both]


def in_one(epochs, accumulate=2, momentum=0.9, fits=1, dtype=None):
    """The parameters after the same training in this process."""
    model = mlp(0).to(dtype or torch.float64)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None, cache_enabled=False)
    for _ in range(fits):
        optimizer = rgd_ext.RGD(model, lr=RATE, momentum=momentum, epsilon=policy())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for epoch in range(epochs):
            batches = batches_of(epoch)
            for start in range(0, len(batches), 2 * accumulate):
                with precision:
                    union_step(model, optimizer, batches[start : start + 2 * accumulate], of=2 * accumulate)
            scheduler.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["whole", "resumed", "manual"])
def test_a_training_equals_that_of_one_process(outcomes, name):
    assert_same_as(outcomes, name, in_one(2))


def test_a_second_fit_captures_the_model_anew(outcomes):
    assert_same_as(outcomes, "fit twice", in_one(1, fits=2))


def test_under_the_strategy_ddp_the_callback_writes_the_direction_of_the_union(outcomes):
    assert_same_as(outcomes, "wrapped", in_one(1))  # the schedule begins after the epoch


def test_the_callback_logs_the_statistics_of_all_samples(outcomes):
    whole, in_parts = ([outcome[name]["logged"] for outcome in outcomes] for name in ("whole", "in parts"))
    assert whole[0]["rgd/batch_size"] == in_parts[0]["rgd/net/batch_size"] == 6  # the last batch of each has 3
    assert whole[0]["rgd/trace"] == whole[1]["rgd/trace"] > 0


def test_a_part_may_be_captured_for_any_optimizer_and_the_rest_becomes_that_of_rank_0(outcomes):
    frozen = torch.zeros(2, dtype=torch.float64)
    assert_same_as(outcomes, "in parts", [frozen, *in_one(1, accumulate=1, momentum=0)])


def test_a_training_that_stopped_between_two_steps_leaves_nothing_to_the_next(outcomes):
    frozen = torch.zeros(2, dtype=torch.float64)
    assert_same_as(outcomes, "stopped", [frozen, *in_one(1, momentum=0)])


def test_bfloat16_equals_autocast_in_one_process(outcomes):
    expected = in_one(1, momentum=0, dtype=torch.float32)
    assert_same_as(outcomes, "bfloat16", expected, rtol=0, atol=1e-6)


def test_metrics_are_those_of_all_processes(outcomes):
    model = mlp(0)
    for parameter, found in zip(model.parameters(), outcomes[0]["whole"]["parameters"], strict=True):
        parameter.data = found
    x, y = VALIDATION.tensors
    expected = torch.nn.functional.mse_loss(model(x), y).item()
    assert [outcome["whole"]["logged"]["validation"] for outcome in outcomes] == pytest.approx([expected] * 2)


def test_a_parameter_that_is_trained_and_not_captured_is_an_error(outcomes):
    assert all("'net.2.weight' is trained and not captured" in outcome["not captured"] for outcome in outcomes)


def test_a_capture_without_a_group_is_an_error(outcomes):
    assert all("pass process_group=torch.distributed.group.WORLD" in each["without a group"] for each in outcomes)


def test_options_of_the_wrapper_are_refused():
    with pytest.raises(TypeError, match="find_unused_parameters"):
        RGDStrategy(find_unused_parameters=True)
    with pytest.raises(TypeError, match="ddp_comm_hook"):
        RGDStrategy(ddp_comm_hook=print)


def test_it_is_of_the_package_under_its_old_name_if_that_is_the_only_one(monkeypatch):
    strategies = pytest.importorskip("pytorch_lightning.strategies")
    for name in "lightning", "lightning.pytorch", "lightning.pytorch.strategies":
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, RGDStrategy.__module__)
    assert issubclass(importlib.import_module(RGDStrategy.__module__).RGDStrategy, strategies.DDPStrategy)
