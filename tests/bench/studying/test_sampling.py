"""D of batches beside that of the data set, against dense matrices in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from dense import Dense, assert_left_alone, largest
from matplotlib.figure import Figure
from torch.func import jacrev

from bench.studying.data import Sources
from bench.studying.question import Finished, Line, Scope
from bench.studying.questions.sampling import QUESTION
from bench.studying.sampling import comparison
from bench.studying.sampling.comparison import OWNERS, SGD, compare
from bench.studying.sampling.settings import OTHER_SIMILARITIES, SIMILARITIES, settings
from bench.studying.sampling.summary import numbers
from bench.studying.steps.loss import Loss

SIZE, DRAWS = 6, 3
QUICK = QUESTION.plan(Finished(), Scope(quick=True, data=("digits",)))


@pytest.fixture
def compared(model, samples, monkeypatch):
    monkeypatch.setattr(comparison, "SIZES", (SIZE,))
    monkeypatch.setattr(comparison, "DRAWS", DRAWS)
    return compare(model, samples, torch.Generator().manual_seed(2))


def cosine(left, right):
    return (left @ right / left.norm() / right.norm()).item()


def corrected(gradient, matrix):
    return gradient - 0.5 / largest(matrix) * matrix @ gradient


def test_similarities_are_those_of_the_dense_matrices(model, samples, compared):
    dense = Dense(model, samples)
    mean, matrix = dense.moments()
    batches, wanted = dense.drawn(torch.Generator().manual_seed(2), SIZE, DRAWS), matrix @ mean
    expected = {
        "eigenvalue": [largest(of_batch) / largest(matrix) for _, of_batch in batches],
        "trace": [(of_batch.trace() / matrix.trace()).item() for _, of_batch in batches],
        "effective_rank": [of_batch.trace().item() / largest(of_batch) for _, of_batch in batches],
        "cosine gradient": [cosine(gradient, mean) for gradient, _ in batches],
        "cosine mean": [cosine(of_batch @ mean, wanted) for _, of_batch in batches],
        "cosine batch": [cosine(of_batch @ gradient, wanted) for gradient, of_batch in batches],
        "cosine other": [cosine(batches[(k + 1) % DRAWS][1] @ batches[k][0], wanted) for k in range(DRAWS)],
        "cosine data": [cosine(matrix @ gradient, wanted) for gradient, _ in batches],
        "length batch": [((g - corrected(g, of_batch)).norm() / g.norm()).item() for g, of_batch in batches],
        "length data": [((g - corrected(g, matrix)).norm() / g.norm()).item() for g, _ in batches],
    }
    for name, values in expected.items():
        assert compared[name][0] == pytest.approx(np.mean(values), rel=1e-4), name


def test_decreases_are_those_at_the_best_of_many_rates(model, samples, compared):
    dense = Dense(model, samples)
    _, matrix = dense.moments()
    batches = dense.drawn(torch.Generator().manual_seed(2), SIZE, DRAWS)
    directions = {
        "SGD": [gradient for gradient, _ in batches],
        "batch": [corrected(*batch) for batch in batches],
        "other": [corrected(gradient, other) for (gradient, _), (_, other) in pairwise([*batches, batches[0]])],
        "data": [corrected(gradient, matrix) for gradient, _ in batches],
    }
    for name, of_name in directions.items():
        assert compared[f"decrease {name}"][0] == pytest.approx(dense.decrease(of_name), rel=5e-3), name


def test_all_samples_in_a_batch_give_the_data_set_itself(compared):
    for name in ("eigenvalue", "trace", *(f"cosine {each}" for each in ("gradient", "mean", *OWNERS))):
        assert compared[name][-1] == pytest.approx(1, abs=1e-6), name
    assert len({compared[f"decrease {owner}"][-1] for owner in OWNERS}) == 1


def test_the_mean_loss_has_no_slope_at_the_best_rate(model, samples):
    dense = Dense(model, samples)
    directions = -dense.gradients[:2].float() + 3 * dense.gradients.mean(0).float()
    rate, decrease = Loss(model, samples).best_step(directions, 0.1)

    def mean(rate):
        return torch.stack([dense.losses(dense.x - rate * each).mean() for each in directions.double()]).mean()

    slopes = [jacrev(mean)(torch.tensor(each, dtype=torch.float64)).item() for each in (0.0, rate)]
    assert slopes[0] < 0
    assert abs(slopes[1]) < 0.05 * abs(slopes[0])
    assert decrease == pytest.approx((mean(0.0) - mean(rate)).item(), rel=1e-4)


def test_comparison_leaves_the_model_alone(model, samples):
    assert_left_alone(model, lambda model: compare(model, samples, torch.Generator().manual_seed(2)))


def test_run_is_a_pure_function_of_the_configuration():
    config = QUICK[0] | {"samples": 30}
    first = QUESTION.run(config, Sources())
    torch.rand(1)
    assert QUESTION.run(config, Sources()) == first
    assert {np.shape(values) for values in first.values()} == {(2, 2)}  # points, and batches of 16 and of all samples


def finished(decreases, seeds=(0, 1), **entries):
    """A training of 100 samples, with these decreases of the loss in all places, for seed 1 twice as large."""
    config = {"data": "digits", "labels": "clean", "samples": 100, "steps": 60} | entries
    lines = Finished()
    for seed in seeds:
        outcome = {name: [[3, 2, 1], [6, 5, 3]] for name in (*SIMILARITIES, *OTHER_SIMILARITIES)}
        outcome |= {f"decrease {name}": [[(1 + seed) * value] * 3] * 2 for name, value in decreases.items()}
        lines.add(Line(config | {"seed": seed}, outcome, 1.0, {}))
    return lines


DECREASES = {SGD: 2.0, "batch": 4.0, "other": 1.0, "data": 10.0}


def rows(lines, table):
    """Those of step 60, by data, labels and whose D it is: the cell of each size."""
    found = QUESTION.answer(lines).tables[table].rows
    return {(data, labels, owner): cells for data, labels, step, owner, *cells in found if step == "60"}


def test_gains_are_decreases_over_those_of_sgd():
    assert rows(finished(DECREASES), "gains") == {
        ("digits", "clean labels", "the batch"): ["2.00 (2.00 to 2.00)"] * 3,
        ("digits", "clean labels", "another batch"): ["0.50 (0.50 to 0.50)"] * 3,
        ("digits", "clean labels", "the data set"): ["5.00 (5.00 to 5.00)"] * 3,
    }


def test_decreases_are_also_compared_with_those_with_d_of_the_batch():
    assert rows(finished(DECREASES), "over_batch") == {
        ("digits", "clean labels", "another batch"): ["0.25 (0.25 to 0.25)"] * 2,
        ("digits", "clean labels", "the data set"): ["2.50 (2.50 to 2.50)"] * 2,
    }


def test_trainings_together_are_compared_by_seed():
    """Differences that cancel within each seed are no noise, in whatever order the seeds were finished."""
    lines = finished(DECREASES)
    for seed, data in ((2, 1.0), (1, 40.0), (0, 10.0)):
        for line in finished(DECREASES | {"data": data}, seeds=[seed], labels="symmetric 0.4"):
            lines.add(line)
    for line in lines:
        if line.config["labels"] == "clean" and line.config["seed"] == 1:
            line.outcome["decrease data"] = [[5.0] * 3] * 2  # a quarter of 20
    assert rows(lines, "gains")["all", "all", "the data set"] == ["5.00 (5.00 to 5.00)"] * 3
    assert QUESTION.answer(lines).numbers["gain_data.16.60"] == "5.00 (5.00 to 5.00)"


def test_numbers_are_ranges_over_steps_and_labels():
    lines = finished(DECREASES)
    for line in finished(DECREASES | {"data": 20.0}, labels="symmetric 0.4"):
        lines.add(line)
    found = numbers(settings(lines))
    assert (found["eigenvalue.16.least"], found["eigenvalue.16.largest"]) == ("3.00", "6.00")
    assert (found["eigenvalue.all.60.least"], found["eigenvalue.all.60.largest"]) == ("3.00", "3.00")
    assert (found["gain_data.64.0.least"], found["gain_data.64.0.largest"]) == ("5.00", "10.00")
    assert found["data_over_batch.64.60.symmetric_0_4.least"] == "5.00"


def test_rank_correlation_is_that_of_lengths_and_gains_over_settings():
    lines = Finished()
    for labels, data, lengths in (("clean", 4.0, (0.3, 0.2)), ("symmetric 0.4", 3.0, (0.2, 0.3))):
        for line in finished(DECREASES | {"data": data}, labels=labels, steps=0):
            line.outcome["length data"] = [[lengths[0], 0.25, lengths[1]]]
            lines.add(line)
    assert "rank_correlation" not in numbers(settings(lines))
    for line in finished(DECREASES | {"data": 3.5}, labels="symmetric 0.2", steps=0):
        line.outcome["length data"] = [[0.3, 0.25, 0.35]]
        lines.add(line)
    found = numbers(settings(lines))
    assert (found["rank_correlation"], found["settings"]) == ("1.00", "3")
    assert "later.rank_correlation" not in found


def without_common_seeds():
    lines = finished(DECREASES, seeds=[0])
    for line in finished(DECREASES, seeds=[1], labels="symmetric 0.4"):
        lines.add(line)
    return lines


@pytest.mark.parametrize(
    "lines",
    [Finished(), finished(DECREASES), finished(DECREASES, steps=0), without_common_seeds()],
    ids=["none", "steps", "step 0 alone", "no common seeds"],
)
def test_answer_to_a_part_of_the_lines(lines):
    answer = QUESTION.answer(lines)
    draw, height = answer.figures["curves"]
    figure = Figure(figsize=(10, height), layout="constrained")
    draw(figure)
    figure.canvas.draw()
    assert bool(answer.numbers) == bool(len(lines))
