"""Trainings of the study: a pure function of the configuration, and by all methods on the same terms."""

import gc
import json
import math
import time
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.nn.utils import parameters_to_vector

from bench.studying import step_times, training
from bench.studying.data import Samples, Split
from bench.studying.data.corruption import symmetric
from bench.studying.methods import METHODS, Method, Step
from bench.studying.scores import scores
from bench.studying.task import seeds_of, task_of
from bench.studying.training import train


class Blobs:
    """Sources of synthetic samples: images with a bright place for each of ten classes, and noise."""

    def split(self, name, samples):
        generator = torch.Generator().manual_seed(0)

        def drawn(count):
            labels = torch.arange(count) % 10
            inputs = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
            inputs.flatten(1)[range(count), 6 * labels] += 2
            return Samples(inputs, labels)

        return Split(drawn(samples), drawn(30), drawn(100))


CONFIG = {
    "data": "blobs",
    "samples": 50,
    "labels": "clean",
    "model": "small MLP",
    "method": "SGD",
    "lr": 0.05,
    "momentum": 0.9,
    "batch_size": 8,
    "steps": 18,
    "seed": 0,
    "evaluate": "test",
}


def observed(monkeypatch, config):
    """What a training calls `Step` with, and the outputs before each step."""
    calls, call = [], Step.__call__

    def recorded(step, inputs, labels):
        calls.append((inputs, labels, call(step, inputs, labels)))
        return calls[-1][-1]

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", recorded)
        train(config, Blobs())
    return calls


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("SGD", "UPGrad")])
def test_methods_differ_neither_in_the_initial_weights_nor_in_batches_or_labels(monkeypatch, name):
    config = CONFIG | {"labels": "symmetric 0.4", "steps": 12}
    of_sgd = observed(monkeypatch, config)
    of_method = observed(monkeypatch, config | {"method": name})
    assert len(of_method) == len(of_sgd) == 12
    assert of_method[0][2].equal(of_sgd[0][2])
    assert not of_method[-1][2].equal(of_sgd[-1][2])
    for (inputs, labels, _), (other_inputs, other_labels, _) in zip(of_method, of_sgd, strict=True):
        assert inputs.shape[0] == 8
        assert inputs.equal(other_inputs)
        assert labels.equal(other_labels)


def test_the_seed_determines_weights_batches_and_wrong_labels(monkeypatch):
    config = CONFIG | {"labels": "symmetric 0.4"}
    (inputs, _, _), *_ = observed(monkeypatch, config)
    (other_inputs, _, _), *_ = observed(monkeypatch, config | {"seed": 1})
    assert not inputs.equal(other_inputs)
    models = [training.initial_model(config | {"seed": seed}, task_of(config, Blobs())) for seed in (0, 0, 1)]
    weights = [parameters_to_vector(model.parameters()) for model in models]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
    labels = [task_of(config | {"seed": seed}, Blobs()).train.labels for seed in (0, 0, 1)]
    assert labels[0].equal(labels[1])
    assert not labels[0].equal(labels[2])
    assert len({*seeds_of(config), *seeds_of(config | {"seed": 1})}) == 6


def test_an_epoch_has_no_sample_twice_and_leaves_out_less_than_a_batch():
    samples = Samples(torch.arange(50), torch.arange(50))
    labels = [batch.labels for batch in training.batches_of(CONFIG, samples)]
    assert len(labels) == 18
    first, second = torch.cat(labels[:6]), torch.cat(labels[6:12])
    assert len(first) == len(first.unique()) == 48
    assert not first.equal(second)


def test_rates_fall_along_a_cosine_of_the_steps(monkeypatch):
    rates = []
    monkeypatch.setattr(Step, "set_lr", lambda _, lr: rates.append(lr))
    train(CONFIG, Blobs())
    assert rates == pytest.approx([0.025 * (1 + math.cos(math.pi * step / 18)) for step in range(18)], rel=1e-12)


@pytest.mark.parametrize("name", ["SGD", "SAM(0.1)", "Spectral(0.9)", "exact Spectral(16)", "clipping (median)"])
def test_a_training_is_a_pure_function(name):
    config = CONFIG | {"method": name, "labels": "symmetric 0.4"}
    torch.manual_seed(1)
    first = train(config, Blobs())
    state = torch.get_rng_state()
    torch.rand(3)
    assert json.dumps(train(config, Blobs())) == json.dumps(first)
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state)


def test_a_training_learns_and_says_so():
    outcome = train(CONFIG | {"steps": 64, "lr": 0.1}, Blobs())
    assert len(outcome["training_losses"]) == len(outcome["accuracies"]) == training.POINTS
    assert outcome["training_loss"] < 0.5 < outcome["initial_loss"]
    assert outcome["training_losses"][-1] < 0.5 < outcome["training_losses"][0]
    assert outcome["accuracy"] == outcome["accuracies"][-1] > 0.95
    assert outcome["training_accuracy"] > 0.95
    assert not outcome["diverged"]


@pytest.mark.parametrize("name", METHODS)
def test_a_training_that_diverges_says_so_in_valid_json(name):
    if name == "UPGrad":
        pytest.importorskip("torchjd")
        pytest.importorskip("quadprog")
    outcome = train(CONFIG | {"method": name, "model": "MLP", "lr": 1e10}, Blobs())
    assert outcome["diverged"]
    assert outcome["loss"] is None
    assert 0 <= outcome["accuracy"] <= 0.5
    json.dumps(outcome, allow_nan=False)


def test_a_training_that_diverges_in_its_last_step_says_so():
    outcome = train(CONFIG | {"model": "MLP", "lr": 1e30, "batch_size": 50, "steps": 1}, Blobs())
    assert None not in outcome["training_losses"]
    assert outcome["diverged"]


def test_only_the_training_set_has_wrong_labels():
    split = Blobs().split("blobs", 50)
    config = CONFIG | {"labels": "symmetric 0.4"}
    test, validation = (task_of(config | {"evaluate": name}, Blobs()) for name in ("test", "validation"))
    assert test.train.labels.equal(validation.train.labels)
    assert test.train.labels.equal(symmetric(split.train.labels, 0.4, 10, seeds_of(config).train)[0])
    assert validation.evaluation.labels.equal(split.validation.labels)
    assert test.evaluation.inputs.equal(split.test.inputs)
    assert test.counts.equal(test.train.labels.bincount(minlength=10))


def test_samples_to_evaluate_are_those_of_the_defect():
    for name, samples in (("test", 100), ("validation", 30)):
        task = task_of(CONFIG | {"labels": "contrast 0.9", "evaluate": name}, Blobs())
        assert len(task.evaluation) == 2 * samples
        assert task.evaluation.groups.bincount().tolist() == [samples // 2] * 4
        assert len(task.train) == 50


def test_scores_weight_classes_alike_only_in_the_balanced_accuracy():
    outputs = one_hot(torch.tensor([0, 0, 0, 2, 0, 2]), 4).float()
    found = scores(nn.Identity(), Samples(outputs, torch.tensor([0, 0, 0, 0, 2, 2])))
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["worst_accuracy"] == 1 / 2


def test_scores_are_those_of_the_groups_if_the_samples_have_some():
    outputs = one_hot(torch.tensor([0, 0, 0, 2, 0, 2]), 4).float()
    found = scores(nn.Identity(), Samples(outputs, torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([7, 7, 7, 3, 3, 3])))
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["worst_accuracy"] == pytest.approx(1 / 3)
    expected = (4 * (math.log(math.e + 3) - 1) + 2 * math.log(math.e + 3)) / 6
    assert found["loss"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["Spectral(0.5)", "SAM(0.1)"])
def test_trainings_leave_neither_captures_nor_models(monkeypatch, name):
    models, build = [], training.build

    def watched(*arguments):
        model = build(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(training, "build", watched)
    train(CONFIG | {"method": name}, Blobs())
    step_times.step_seconds(CONFIG | {"method": name}, Blobs(), rounds=2)
    gc.collect()
    assert [model() for model in models] == [None] * 3


def test_times_are_those_of_steps_beside_sgd(monkeypatch):
    def slow(model, lr, momentum):
        optimizer = METHODS["SGD"].optimizer(model, lr, momentum)
        optimizer.register_step_pre_hook(lambda *_: time.sleep(0.005))
        return optimizer

    monkeypatch.setitem(METHODS, "slow", Method(slow))
    found = step_times.step_seconds(CONFIG | {"method": "slow"}, Blobs(), rounds=5)
    assert found["seconds"] > 0.005 > found["sgd_seconds"]
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert found["ratio"] == pytest.approx(found["seconds"] / found["sgd_seconds"], rel=0.5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "SDG"}, "method 'SDG': choose one of SGD, AdamW"),
        ({"evaluate": "train"}, 'evaluate \'train\': pass "validation" or "test"'),
        ({"batch_size": 51}, "batch_size 51 for 50 training samples: pass at most 50"),
    ],
)
def test_wrong_entries_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        train(CONFIG | entry, Blobs())
