"""Trainings with Accelerate in two processes are those of one process that takes all samples."""

import pytest
import torch
from trainers import RATE, TORCHRUN, assert_same_as, mlp, policy, run_two, union_step

import rgd_ext

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_two(tmp_path_factory, "accelerate_program.py", launcher=TORCHRUN)


def in_one(outcomes, name, momentum=0.9, dtype=torch.float64):
    """The parameters after a training in this process with the batches of both."""
    model = mlp(0).to(dtype)
    optimizer = rgd_ext.RGD(model, lr=RATE, momentum=momentum, epsilon=policy())
    batches = [outcome[name]["batches"] for outcome in outcomes]
    # An epoch has three batches and two steps: the last of them takes one batch, and has the divisor of two.
    for start in range(0, len(batches[0]), 3):
        for step in (start, start + 1), (start + 2,):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32, cache_enabled=False):
                union_step(model, optimizer, [each[place] for each in batches for place in step], of=4)
    return [p.detach() for p in model.parameters()]


def test_a_training_equals_that_of_one_process(outcomes):
    assert_same_as(outcomes, "whole", in_one(outcomes, "whole"))


def test_a_resumed_training_goes_on_along_its_trajectory(outcomes):
    assert_same_as(outcomes, "resumed", in_one(outcomes, "whole"))


def test_bfloat16_equals_autocast_in_one_process(outcomes):
    expected = in_one(outcomes, "bfloat16", momentum=0, dtype=torch.float32)
    assert_same_as(outcomes, "bfloat16", expected, rtol=0, atol=1e-6)
