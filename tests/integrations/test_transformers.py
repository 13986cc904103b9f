"""Trainings by the Trainer of Hugging Face in two processes are those of one process that takes all samples."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from trainers import RATE, TORCHRUN, assert_same_as, language_model, policy, run_two, union_step

import rgd_ext

pytest.importorskip("accelerate")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_two(tmp_path_factory, "transformers_program.py", launcher=TORCHRUN)


def in_one(outcomes, name, smoothing=0.0, dtype=torch.float64):
    """The parameters after a training in this process with the batches of both."""
    model = language_model(0).to(dtype)
    optimizer = rgd_ext.RGD(model, lr=RATE, momentum=0.9, epsilon=policy())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    batches = [outcome[name]["batches"] for outcome in outcomes]

    def loss(outputs, labels):
        scores, tokens = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return cross_entropy(scores, tokens, reduction="sum", label_smoothing=smoothing)

    # The steps of two epochs of three batches: two batches, and the third.
    for start, end in (0, 2), (2, 3), (3, 5), (5, 6):
        union = [batch for each in batches for batch in each[start:end]]
        tokens = sum(int((labels[:, 1:] != -100).sum()) for _, labels in union)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32, cache_enabled=False):
            union_step(model, optimizer, union, loss=loss, of=tokens)
        scheduler.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["whole", "evaluated"])
def test_a_training_equals_that_of_one_process_also_after_an_evaluation(outcomes, name):
    assert_same_as(outcomes, name, in_one(outcomes, name))


def test_a_resumed_training_goes_on_along_its_trajectory(outcomes):
    assert_same_as(outcomes, "resumed", in_one(outcomes, "whole"))


def test_label_smoothing_equals_that_of_one_process(outcomes):
    assert_same_as(outcomes, "smoothed", in_one(outcomes, "smoothed", smoothing=0.1))


def test_bfloat16_equals_autocast_in_one_process(outcomes):
    assert_same_as(outcomes, "bfloat16", in_one(outcomes, "bfloat16", dtype=torch.float32), rtol=0, atol=1e-6)


def test_both_log_the_statistics_of_all_samples(outcomes):
    first, second = ([row for row in each["whole"]["log"] if "rgd/trace" in row] for each in outcomes)
    assert first == second
    assert [row["rgd/batch_size"] for row in first] == [16, 8, 16, 8]  # of two batches of 4, and one, in each
