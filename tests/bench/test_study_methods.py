"""The methods of the study are what their names say, and trainings by them differ in nothing else."""

import copy
import gc
import json
import math
import time
import weakref

import oracle
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy, log_softmax, one_hot

import rgd_ext
from bench.studying import step_times, training
from bench.studying.data import Samples, Split
from bench.studying.data.corruption import symmetric
from bench.studying.methods import METHODS, Method, Step
from bench.studying.scores import scores
from bench.studying.task import seeds_of, task_of
from bench.studying.training import train

CLASSES, COUNTS = 4, torch.tensor([10, 2, 5, 0])  # of the last class there are no training samples
LR = 0.1


def started(name, model, lr=LR, momentum=0.0, counts=COUNTS):
    """The step of a method; skips where a method needs what is not installed."""
    if name == "UPGrad":
        pytest.importorskip("torchjd")
        pytest.importorskip("quadprog")
    return METHODS[name].start(model, lr, momentum, counts)


def tiny():
    """A model in float64, inputs (8, 6) and labels (8,)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    return model, torch.randn(8, 6, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 0, 2, 2, 1])


def flat_weights(model):
    return oracle.flat(parameter.detach().clone() for parameter in model.parameters())


class Batch:
    """Of a model and a batch, by definition: per-sample gradients (B, d), losses (B,) and gradients of any loss."""

    def __init__(self, model, inputs, labels):
        self.model, self.inputs, self.labels = copy.deepcopy(model), inputs, labels
        self.grads = oracle.per_sample_gradients(model, lambda outputs: cross_entropy(outputs, labels), [inputs])
        self.mean = self.grads.mean(0)
        self.logs = log_softmax(model(inputs).detach(), 1)
        self.losses = -self.logs[range(len(labels)), labels]
        self.weights = flat_weights(model)

    def gradient(self, loss, at=None):
        """Of loss(log probabilities), (d,), at flat weights."""

        def of_weights(weights):
            sizes = [parameter.numel() for parameter in self.model.parameters()]
            named = {
                name: part.view_as(parameter)
                for (name, parameter), part in zip(self.model.named_parameters(), weights.split(sizes), strict=True)
            }
            return loss(log_softmax(functional_call(self.model, named, self.inputs), 1))

        return grad(of_weights)(self.weights if at is None else at)

    def weighted(self, weights):
        return weights @ self.grads


def along(policy, fraction, inverse="weak-field"):
    return lambda batch: oracle.direction(batch.grads, policy, fraction, inverse)


def ascended(rho):
    def gradient(batch):
        def likelihood(logs):
            return -(logs * one_hot(batch.labels, CLASSES)).sum(1).mean()

        return batch.gradient(likelihood, batch.weights + rho * batch.mean / batch.mean.norm())

    return gradient


def without_largest(dropped):
    return lambda batch: batch.grads[batch.losses.argsort()[: len(batch.labels) - dropped]].mean(0)


def exponential(tau):
    def gradient(batch):
        weights = [math.exp(min(loss, tau) / (tau + 1)) / len(batch.labels) for loss in batch.losses.tolist()]
        return batch.weighted(torch.tensor(weights, dtype=torch.float64))

    return gradient


def clipped(batch):
    norms = batch.grads.norm(dim=1)
    limit = norms.sort().values[3]  # the lower median of eight
    return batch.weighted(torch.tensor([min(1, limit / norm) / 8 for norm in norms], dtype=torch.float64))


def class_weighted(batch):
    weights = torch.tensor([17 / (4 * count) for count in (10, 2, 5)], dtype=torch.float64)[batch.labels]
    return batch.weighted(weights / weights.sum())


def smoothed(batch):
    given = 0.9 * one_hot(batch.labels, CLASSES).double() + 0.1 / CLASSES
    return batch.gradient(lambda logs: -(given * logs).sum(1).mean())


def focal(batch):
    def loss(logs):
        likely = logs.gather(1, batch.labels[:, None])
        return -((1 - likely.exp()) ** 2 * likely).mean()

    return batch.gradient(loss)


def projected(batch):
    """The mean of the projections of the gradients on {d: <g_i, d> >= 0 for all i}, each by its dual problem."""
    from scipy.optimize import nnls

    rows = batch.grads.numpy()
    multipliers = [nnls(rows.T, -row)[0] for row in rows]
    return batch.mean + torch.tensor(sum(multipliers) / len(rows)) @ batch.grads


def adamw_at_first(batch):
    return batch.mean / (batch.mean.abs() + 1e-8) + 0.01 * batch.weights


DIRECTIONS = {
    "SGD": lambda batch: batch.mean,
    "AdamW": adamw_at_first,
    "Spectral(0.5)": along("Spectral", 0.5),
    "Spectral(0.9)": along("Spectral", 0.9),
    "Spectral(-0.5)": along("Spectral", -0.5),
    "Spectral(-0.9)": along("Spectral", -0.9),
    "Trace(0.5)": along("Trace", 0.5),
    "Trace(-0.5)": along("Trace", -0.5),
    "Rayleigh(0.5)": along("Rayleigh", 0.5),
    "Rayleigh(-0.5)": along("Rayleigh", -0.5),
    "exact Spectral(1)": along("Spectral", 1, "exact"),
    "exact Spectral(4)": along("Spectral", 4, "exact"),
    "exact Spectral(16)": along("Spectral", 16, "exact"),
    "exact Spectral(64)": along("Spectral", 64, "exact"),
    "Ascent(0.1)": along("Ascent", 0.1),
    "Ascent(0.3)": along("Ascent", 0.3),
    "SAM(0.05)": ascended(0.05),
    "SAM(0.1)": ascended(0.1),
    "SAM(0.3)": ascended(0.3),
    "clipping (median)": clipped,
    "UPGrad": projected,
    "truncation(0.2)": without_largest(2),
    "truncation(0.4)": without_largest(3),
    "label smoothing(0.1)": smoothed,
    "re-weighting(1)": exponential(1),
    "re-weighting(3)": exponential(3),
    "class weights": class_weighted,
    "focal loss(2)": focal,
}
# TorchJD adds 1e-6 to the diagonal of the Gramian that it divides by its trace.
TOLERANCE = {"UPGrad": 1e-4}


def test_all_methods_have_a_definition_here():
    assert DIRECTIONS.keys() == METHODS.keys()


@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_first_step_is_along_the_direction_of_the_definition(name):
    model, inputs, labels = tiny()
    before, expected = flat_weights(model), DIRECTIONS[name](Batch(model, inputs, labels))
    outputs = model(inputs).detach()
    with started(name, model) as step:
        assert step(inputs, labels).equal(outputs)
    assert oracle.relative_error((before - flat_weights(model)) / LR, expected) < TOLERANCE.get(name, 1e-11)


@pytest.mark.parametrize("name", [name for name in DIRECTIONS if name not in ("SGD", "AdamW")])
def test_directions_differ_from_the_gradient(name):
    batch = Batch(*tiny())
    assert oracle.relative_error(DIRECTIONS[name](batch), batch.mean) > 1e-3


@pytest.mark.parametrize("name", [name for name in DIRECTIONS if name != "AdamW"])
def test_the_second_step_has_momentum_and_the_new_rate(name):
    model, inputs, labels = tiny()
    with started(name, model, momentum=0.9) as step:
        first = DIRECTIONS[name](Batch(model, inputs, labels))
        step(inputs, labels)
        before, second = flat_weights(model), DIRECTIONS[name](Batch(model, inputs, labels))
        step.set_lr(LR / 2)
        step(inputs, labels)
    moved = (before - flat_weights(model)) / (LR / 2)
    assert oracle.relative_error(moved, 0.9 * first + second) < TOLERANCE.get(name, 1e-11)


def test_the_momentum_of_adamw_is_its_own():
    ends = []
    for momentum in (0.0, 0.9):
        model, inputs, labels = tiny()
        step = started("AdamW", model, momentum=momentum)
        step(inputs, labels)
        step(inputs, labels)
        ends.append(flat_weights(model))
    assert ends[0].equal(ends[1])


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_gradients_is_that_of_the_forwards(name):
    model, inputs, labels = tiny()
    outputs = []
    with started(name, model) as step:
        step(inputs, labels)  # the first one may verify the capture
        model.register_forward_hook(lambda *_: outputs.append(None))
        step(inputs, labels)
    assert len(outputs) == METHODS[name].gradients


def test_gradients_that_are_zero_are_not_clipped_to_nan():
    model, inputs, _ = tiny()
    nn.init.zeros_(model[2].weight)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([1e3, 0, 0, 0]))  # the loss of a sample of class 0 is zero
    before = flat_weights(model)
    with started("clipping (median)", model) as step:
        step(inputs, torch.tensor([0, 0, 0, 0, 0, 0, 2, 1]))
    assert flat_weights(model).equal(before)


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
    weights = [flat_weights(model) for model in models]
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


def test_a_step_that_ends_removes_the_capture():
    model, inputs, labels = tiny()
    with started("Spectral(0.5)", model) as step:
        step(inputs, labels)
        assert rgd_ext.handle_of(model) is not None
    assert rgd_ext.handle_of(model) is None


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
