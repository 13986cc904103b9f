"""Slopes and gains of steps of RGD, against dense matrices in float64."""

import numpy as np
import pytest
import torch
from dense import Dense, classifier, images

from bench.studying import descent
from bench.studying.data import Sources
from bench.studying.descent import POLICIES, compare
from bench.studying.question import Finished, Line, Scope
from bench.studying.questions.descent import QUESTION

SIZE, DRAWS = 6, 3
QUICK = QUESTION.plan(Finished(), Scope(quick=True, data=("digits",)))


@pytest.fixture
def model():
    return classifier().eval()


@pytest.fixture
def samples():
    return images(24)


@pytest.fixture
def compared(model, samples, monkeypatch):
    monkeypatch.setattr(descent, "BATCH_SIZE", SIZE)
    monkeypatch.setattr(descent, "DRAWS", DRAWS)
    return compare(model, samples, torch.Generator().manual_seed(2))


@pytest.fixture
def dense(model, samples):
    return Dense(model, samples)


def largest(matrix):
    return torch.linalg.eigvalsh(matrix)[-1]


def epsilon(name, gradient, matrix):
    """That of a policy by its definition."""
    policy, fraction = name.rstrip(")").split("(")
    return (
        float(fraction)
        * {
            "Spectral": 1 / largest(matrix),
            "Trace": 1 / matrix.trace(),
            "Rayleigh": gradient @ gradient / (gradient @ matrix @ gradient),
        }[policy]
    )


def direction(name, gradient, matrix):
    return gradient - epsilon(name, gradient, matrix) * matrix @ gradient


def decrease(dense, direction):
    """The largest one by a step along it, of many."""
    after = [dense.losses(dense.x - rate * direction).mean().item() for rate in np.geomspace(1e-3, 20, 1000)]
    return dense.losses(dense.x).mean().item() - min(after)


@pytest.mark.parametrize("name", POLICIES)
def test_steps_on_all_samples_are_those_of_the_dense_matrix(dense, compared, name):
    gradient, matrix = dense.moments()
    along = direction(name, gradient, matrix)
    assert compared[f"epsilon {name}"] == pytest.approx(
        (epsilon(name, gradient, matrix) * largest(matrix)).item(), rel=1e-4
    )
    assert compared[f"slope {name}"] == pytest.approx((gradient @ along / gradient.square().sum()).item(), rel=1e-4)
    expected = decrease(dense, along) / decrease(dense, gradient)
    assert compared[f"gain {name}"] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_steps_on_batches_are_those_of_their_dense_matrices(dense, compared, name):
    generator = torch.Generator().manual_seed(2)
    batches = [dense.moments(torch.randperm(24, generator=generator)[:SIZE]) for _ in range(DRAWS)]
    mean, _ = dense.moments()
    epsilons = [(epsilon(name, *batch) * largest(batch[1])).item() for batch in batches]
    directions = [direction(name, *batch) for batch in batches]
    slopes = [(g @ along / g.square().sum()).item() for (g, _), along in zip(batches, directions, strict=True)]
    beyond = sum(mean @ along for along in directions) / sum(mean @ g for g, _ in batches)
    assert compared[f"epsilon of batches {name}"] == pytest.approx(np.mean(epsilons), rel=1e-4)
    assert compared[f"slope of batches {name}"] == pytest.approx(np.mean(slopes), rel=1e-4)
    assert compared[f"slope beyond {name}"] == pytest.approx(beyond.item(), rel=1e-4)


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_rayleigh_keeps_its_promise_and_the_others_keep_at_least_theirs(compared, fraction):
    assert compared[f"slope Rayleigh({fraction})"] == pytest.approx(1 - fraction, rel=1e-4)
    assert 1 - fraction < compared[f"slope Spectral({fraction})"] < 1


def test_comparison_leaves_the_model_alone(model, samples):
    before = [parameter.clone() for parameter in model.parameters()]
    compare(model, samples, torch.Generator())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_run_is_a_pure_function_with_a_comparison_at_every_point():
    first, second = (QUESTION.run(QUICK[0], Sources()) for _ in range(2))
    assert first == second
    assert {len(values) for values in first.values()} == {2}
    assert QUESTION.run(QUICK[1], Sources()) != first


def finished(outcomes):
    found = Finished()
    for config, outcome in zip(QUICK, outcomes, strict=True):
        found.add(Line(config, outcome, 1.0, {}))
    return found


def test_numbers_are_the_least_and_the_largest_means_of_the_settings():
    quantities = ("epsilon", "slope", "gain", "epsilon of batches", "slope of batches", "slope beyond")
    wrong = {config["labels"]: config["labels"] != "clean" for config in QUICK}
    outcomes = [
        {
            f"{each} {name}": [1 + config["seed"], 5 + 2 * wrong[config["labels"]]]
            for each in quantities
            for name in POLICIES
        }
        for config in QUICK
    ]
    answer = QUESTION.answer(finished(outcomes))
    assert answer.numbers["slope.spectral_0_5.least"] == "1.50"
    assert answer.numbers["slope.spectral_0_5.largest"] == "7.00"
    assert answer.numbers["slope_of_batches.rayleigh_0_9.60.least"] == "5.00"
    assert answer.numbers["slope_of_batches.rayleigh_0_9.60.largest"] == "7.00"
    assert answer.numbers["slope_of_batches.rayleigh_0_9.60.clean.largest"] == "5.00"
    table = answer.tables["table"]
    assert [row[:3] for row in table.rows] == [
        ["digits", labels, name] for labels in ("clean labels", "40 % wrong labels (symmetric)") for name in POLICIES
    ]
    assert table.rows[0][3] == "5.00 (5.00 to 5.00)"
