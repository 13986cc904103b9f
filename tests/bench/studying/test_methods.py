"""The methods of the study are what their names say."""

import copy
import math

import oracle
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy, log_softmax, one_hot

import rgd_ext
from bench.studying.methods import METHODS

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


def test_a_step_that_ends_removes_the_capture():
    model, inputs, labels = tiny()
    with started("Spectral(0.5)", model) as step:
        step(inputs, labels)
        assert rgd_ext.handle_of(model) is not None
    assert rgd_ext.handle_of(model) is None
