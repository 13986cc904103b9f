"""Slopes and gains of steps of RGD, against dense matrices in float64."""

import numpy as np
import pytest
import torch
from dense import Dense, assert_left_alone, largest

from bench.studying.data import Sources
from bench.studying.question import Finished, Line, Scope
from bench.studying.questions.descent import QUESTION
from bench.studying.steps import descent
from bench.studying.steps.descent import POLICIES, compare

SIZE, DRAWS = 6, 3
QUICK = QUESTION.plan(Finished(), Scope(quick=True, data=("digits",)))


@pytest.fixture
def compared(model, samples, monkeypatch):
    monkeypatch.setattr(descent, "BATCH_SIZE", SIZE)
    monkeypatch.setattr(descent, "DRAWS", DRAWS)
    return compare(model, samples, torch.Generator().manual_seed(2))


@pytest.fixture
def dense(model, samples):
    return Dense(model, samples)


def epsilon(name, gradient, matrix):
    """That of a policy by its definition."""
    policy, fraction = name.rstrip(")").split("(")
    units = {
        "Spectral": 1 / largest(matrix),
        "Trace": 1 / matrix.trace(),
        "Rayleigh": gradient @ gradient / (gradient @ matrix @ gradient),
    }
    return float(fraction) * units[policy]


def direction(name, gradient, matrix):
    return gradient - epsilon(name, gradient, matrix) * matrix @ gradient


@pytest.mark.parametrize("name", POLICIES)
def test_steps_on_all_samples_are_those_of_the_dense_matrix(dense, compared, name):
    gradient, matrix = dense.moments()
    along = direction(name, gradient, matrix)
    assert compared[f"epsilon {name}"] == pytest.approx(
        float(epsilon(name, gradient, matrix) * largest(matrix)), rel=1e-4
    )
    assert compared[f"slope {name}"] == pytest.approx((gradient @ along / gradient.square().sum()).item(), rel=1e-4)
    expected = dense.decrease([along]) / dense.decrease([gradient])
    assert compared[f"gain {name}"] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_steps_on_batches_are_those_of_their_dense_matrices(dense, compared, name):
    batches = dense.drawn(torch.Generator().manual_seed(2), SIZE, DRAWS)
    mean, _ = dense.moments()
    epsilons = [float(epsilon(name, *batch) * largest(batch[1])) for batch in batches]
    directions = [direction(name, *batch) for batch in batches]
    slopes = [(g @ along / g.square().sum()).item() for (g, _), along in zip(batches, directions, strict=True)]
    of_all = sum(mean @ along for along in directions) / sum(mean @ g for g, _ in batches)
    assert compared[f"epsilon of batches {name}"] == pytest.approx(np.mean(epsilons), rel=1e-4)
    assert compared[f"slope of batches {name}"] == pytest.approx(np.mean(slopes), rel=1e-4)
    assert compared[f"slope of all {name}"] == pytest.approx(of_all.item(), rel=1e-4)


def test_slopes_are_what_the_policies_promise(compared):
    assert {name.split("(")[0] for name in POLICIES} == {"Spectral", "Trace", "Rayleigh"}
    for name in POLICIES:
        promised = 1 - float(name.rstrip(")").split("(")[1])
        for slope in (compared[f"slope {name}"], compared[f"slope of batches {name}"]):
            if name.startswith("Rayleigh"):
                assert slope == pytest.approx(promised, rel=1e-4)
            else:
                assert promised < slope < 1


def test_comparison_leaves_the_model_alone(model, samples):
    assert_left_alone(model, lambda model: compare(model, samples, torch.Generator()))


def test_gradients_of_a_training_do_not_matter(model, samples):
    expected = compare(model, samples, torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert compare(model, samples, torch.Generator().manual_seed(0)) == expected


def test_run_is_a_pure_function_with_a_comparison_at_every_point():
    first, second = (QUESTION.run(QUICK[0], Sources()) for _ in range(2))
    assert first == second
    assert {len(values) for values in first.values()} == {2}


def finished(outcomes):
    found = Finished()
    for config, outcome in zip(QUICK, outcomes, strict=True):
        found.add(Line(config, outcome, 1.0, {}))
    return found


def test_numbers_are_the_least_and_the_largest_means_of_the_settings():
    quantities = ("epsilon", "slope", "gain", "epsilon of batches", "slope of batches", "slope of all")
    wrong = {config["labels"]: config["labels"] != "clean" for config in QUICK}
    outcomes = [
        {
            f"{each} {name}": [1 + config["seed"], 5 + 2 * wrong[config["labels"]]]
            for each in quantities
            for name in POLICIES
        }
        for config in QUICK
    ]
    for outcome in outcomes:
        outcome["gain Rayleigh(0.9)"][0] = 0.0007
    answer = QUESTION.answer(finished(outcomes))
    assert answer.numbers["slope.spectral_0_5.least"] == "1.50"
    assert answer.numbers["slope.spectral_0_5.largest"] == "7.00"
    assert answer.numbers["slope_of_batches.rayleigh_0_9.60.least"] == "5.00"
    assert answer.numbers["slope_of_batches.rayleigh_0_9.60.largest"] == "7.00"
    assert answer.numbers["slope_of_batches.rayleigh_0_9.60.clean.largest"] == "5.00"
    assert answer.numbers["gain.rayleigh_0_9.0.least"] == "0.0007"
    table = answer.tables["table"]
    assert [row[:3] for row in table.rows] == [
        ["digits", labels, name] for labels in ("clean labels", "40 % wrong labels (symmetric)") for name in POLICIES
    ]
    assert table.rows[0][3] == "5.00 (5.00 to 5.00)"
