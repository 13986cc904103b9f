"""Branches of a training, the hyperbolas fitted to them, and the predictions of the critical batch size."""

import copy
from itertools import pairwise
from math import exp, log

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from noise_cases import QUICK, SCALES, SOURCES, line
from scipy.optimize import minimize
from torch.nn.functional import cross_entropy

from bench.studying.data import Sources
from bench.studying.noise import predictions
from bench.studying.noise.branches import branch, times
from bench.studying.noise.critical import numbers
from bench.studying.noise.figure import draw
from bench.studying.noise.hyperbola import fitted
from bench.studying.noise.searches import SIZES, branches
from bench.studying.question import Finished, Line
from bench.studying.questions.noise import ENDS_OF, QUESTION

BRANCH = {"batch_seed": 3, "paths": 2, "batch_size": 8, "lr": 1.0, "goal": 0.95}


def losses_of_sgd(model, samples, config, steps):
    """The mean over the paths of the loss on all samples after each step, with the batches of `branch`."""
    generator = torch.Generator().manual_seed(config["batch_seed"])
    models = [copy.deepcopy(model) for _ in range(config["paths"])]
    found = []
    for _ in range(steps + 1):
        found.append(np.mean([cross_entropy(each(samples.inputs), samples.labels).item() for each in models]))
        index = torch.randint(len(samples), (config["paths"], config["batch_size"]), generator=generator)
        for each, of_path in zip(models, index, strict=True):
            optimizer = torch.optim.SGD(each.parameters(), config["lr"])
            optimizer.zero_grad()
            cross_entropy(each(samples.inputs[of_path]), samples.labels[of_path]).backward()
            optimizer.step()
    return found


@pytest.mark.parametrize(("lr", "goal"), [(1.0, 0.95), (0.5, 0.8)])
def test_branch_ends_where_the_mean_loss_of_sgd_crosses_the_goal(model, samples, lr, goal):
    config = BRANCH | {"lr": lr, "goal": goal}
    found, losses = branch(model, samples, config), losses_of_sgd(model, samples, config, 50)
    before, after = next(pair for pair in pairwise(times(8)) if losses[pair[1]] <= goal * losses[0])
    assert (after - before > 1) == (goal == 0.8)
    # The logarithm of the loss is linear between two times.
    share = log(losses[before] / (goal * losses[0])) / log(losses[before] / losses[after])
    assert found.steps == pytest.approx(before + share * (after - before), rel=1e-3)
    of_ends = [cross_entropy(each(samples.inputs), samples.labels).item() for each in found.ends]
    assert found.loss == pytest.approx(losses[after], rel=1e-4) == np.mean(of_ends)
    assert of_ends[0] != of_ends[1]


@pytest.mark.parametrize("lr", [1e4, 1e39, 1e-9])
def test_branch_that_does_not_reach_the_goal_has_no_steps(model, samples, lr, monkeypatch):
    monkeypatch.setattr("bench.studying.noise.branches.LIMIT", 10)
    found = branch(model, samples, BRANCH | {"lr": lr})
    assert found.steps is None
    assert (found.loss is None) == (lr == 1e39)


def test_branch_leaves_its_start_alone(model, samples):
    before = copy.deepcopy(model.state_dict())
    branch(model, samples, BRANCH)
    assert all(torch.equal(before[name], after) for name, after in model.state_dict().items())


@pytest.mark.parametrize(("minimum", "critical"), [(20, 1.5), (7.5, 60), (300, 4000)])
def test_fit_finds_the_hyperbola_of_its_points(minimum, critical):
    steps = [minimum * (1 + critical / size) for size in SIZES]
    found = fitted(SIZES, steps)
    assert (found.minimum, found.critical) == pytest.approx((minimum, critical), rel=1e-3)
    assert found.misfit < 1e-3
    assert found.steps(found.critical) == pytest.approx(2 * found.minimum)


def test_fit_of_scattered_points_is_that_of_least_squares():
    steps = np.array([21.0, 29.0, 60.0, 210.0])

    def squares(x):
        return np.square(np.log(steps) - x[0] - np.log1p(np.exp(x[1]) / np.array(SIZES))).mean()

    best, found = minimize(squares, [3, 4], tol=1e-10), fitted(SIZES, steps)
    assert (log(found.minimum), log(found.critical)) == pytest.approx(tuple(best.x), rel=1e-3)
    assert found.misfit == pytest.approx(best.fun**0.5, rel=1e-3)


def theory(config, minimum=20, critical=80, best_rate=0.7):
    """The steps of S. McCandlish et al.: each gains (2 r - r^2) of the most, with r the rate over the best one."""
    share = 1 + critical / config["batch_size"]
    ratio = config["lr"] * share / best_rate
    return minimum * share / (2 * ratio - ratio**2) if ratio < 2 else None


def search_all(outcome, base, rate=0.1):
    """The finished runs of a search whose runs give `outcome`."""
    finished = Finished()
    while pending := [run for run in branches(finished, base, rate) if run not in finished]:
        for run in pending:
            finished.add(Line(run, outcome(run), 0.0, {}))
    return finished


def test_branches_that_count_have_nearly_the_best_rate_and_batches_of_their_own():
    finished = search_all(lambda run: {"steps": theory(run), "loss": 1.0}, {"seed": 4})
    parts = finished.grouped("part", "batch_size")
    for size in SIZES:
        (counted,), tried = parts["branch", size], parts["search", size]
        assert counted.outcome["steps"] == min(each.outcome["steps"] for each in tried if each.outcome["steps"])
        assert counted.outcome["steps"] == pytest.approx(20 * (1 + 80 / size), rel=0.03)
        assert counted.config["batch_seed"] not in {each.config["batch_seed"] for each in tried}
        assert len(tried) <= 8


def test_search_goes_on_where_no_rate_reaches_the_goal():
    finished = search_all(lambda run: {"steps": None, "loss": abs(log(run["lr"] / 5))}, {"seed": 4})
    found = [
        each.config["lr"]
        for (part, _), lines in finished.grouped("part", "batch_size").items()
        for each in lines
        if part == "branch"
    ]
    assert len(found) == len(SIZES)
    assert all(abs(log(lr / 5)) <= log(2) / 4 for lr in found)


@pytest.fixture
def finished():
    """Two trunks with critical batch sizes of 20 and 45, on which both kinds of noise scales are known."""
    found = Finished()
    for seed, critical in ((0, 20), (1, 45)):
        found.add(line("estimates", seed, SCALES | {"running": 60.0, "errors": {}}))
        ends = SCALES | {"trace": 15.0, "curvature": -0.1}
        for size in SIZES:
            outcome = {"steps": 10 * (1 + critical / size), "loss": 1.0} | ({"ends": ends} if size == ENDS_OF else {})
            found.add(line("branch", seed, outcome, goal=0.7, batch_size=size))
            found.add(line("search", seed, {"steps": 1.0, "loss": 1.0}, goal=0.7, batch_size=size))
    return found


def test_predictions_are_in_units_of_the_fit(finished):
    (setting,) = predictions.settings(finished)
    assert setting.critical().mean == pytest.approx(30, rel=1e-3)
    assert [trunk.fit.minimum for trunk in setting.trunks] == pytest.approx([10, 10], rel=1e-3)
    assert setting.ratios("simple") == pytest.approx([60 / 20, 60 / 45], rel=1e-3)
    assert setting.ratios("Hessian") == pytest.approx([40 / 20, 40 / 45], rel=1e-3)
    assert setting.ratios("running") == setting.ratios("simple")
    assert setting.ratios("simple, end") == pytest.approx([30 / 20, 30 / 45], rel=1e-3)
    assert setting.ratios("Hessian, end") == []  # there the loss has no best step along mu


def test_numbers_judge_predictions_by_their_factors(finished):
    for size in SIZES:  # a setting with another goal, which is not judged
        finished.add(line("branch", 0, {"steps": 1 + 1 / size, "loss": 1.0}, goal=0.5, batch_size=size))
    found = numbers(predictions.settings(finished))
    assert found["digits.mlp.clean.200.0_5.critical"] == "1.0"
    assert found["digits.mlp.clean.200.0_7.critical"] == "30"
    assert found["simple.factor"] == f"{exp(np.sqrt((log(3) ** 2 + log(4 / 3) ** 2) / 2)):.1f}"
    assert found["simple.median"] == "2.0"  # half way between log 3 and log 4/3
    assert found["simple_end.median"] == "1.5"  # too large in one trunk, and too small in the other
    assert found["simple.spread"] == found["constant.spread"] == "1.5"  # (45 / 20)^(1/2)
    assert (found["trunks"], found["hessian.trunks"], found["hessian_end.trunks"]) == ("2", "2", "0")
    assert found["misfit"] == "0"


def test_trunks_with_other_labels_are_another_setting(finished):
    for each in list(finished):
        finished.add(Line(each.config | {"labels": "symmetric 0.4"}, each.outcome, 0.0, {}))
    settings = predictions.settings(finished)
    assert [(each.labels, len(each.trunks)) for each in settings] == [("clean", 2), ("symmetric 0.4", 2)]


def test_trunks_without_common_sizes_are_drawn():
    finished = Finished()
    for seed, left_out in enumerate(SIZES):
        finished.add(line("estimates", seed, SCALES | {"running": 60.0, "errors": {}}))
        for size in set(SIZES) - {left_out}:
            finished.add(line("branch", seed, {"steps": 10 + 200 / size, "loss": 1.0}, goal=0.7, batch_size=size))
    figure = Figure()
    draw(figure, [], predictions.settings(finished))
    curve, points, _ = figure.axes[1].lines
    assert curve.get_xdata()[[0, -1]] == pytest.approx([min(SIZES), max(SIZES)])
    assert not len(points.get_xdata())


def test_trunks_with_too_few_sizes_are_left_out(finished):
    for size in (8, 32):
        finished.add(line("branch", 0, {"steps": None, "loss": 1.0}, goal=0.7, batch_size=size))
    (setting,) = predictions.settings(finished)
    assert len(setting.trunks) == 1


@pytest.mark.parametrize("part", ["estimates", "search", "branch"])
def test_run_is_a_pure_function(part):
    config = QUICK[0] | BRANCH | {"part": part, "batch_size": ENDS_OF}
    first = QUESTION.run(config, SOURCES)
    torch.rand(1)
    assert QUESTION.run(config, Sources()) == first  # another object, so that the trunk is trained again


def test_small_batches_may_take_more_steps():
    assert times(8)[-1] > 10 * times(512)[-1]


def test_ends_are_those_of_all_paths():
    found = QUESTION.run(QUICK[0] | BRANCH | {"part": "branch", "batch_size": ENDS_OF}, SOURCES)
    assert found["ends"]["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert found["ends"]["loss"] <= BRANCH["goal"] * QUESTION.run(QUICK[0], SOURCES)["loss"]


def test_answer_needs_neither_lines_nor_branches():
    finished = Finished()
    figure, _ = QUESTION.answer(finished).figures["scales"]
    figure(Figure())
    finished.add(Line(QUICK[0], QUESTION.run(QUICK[0], SOURCES), 0.0, {}))
    answer = QUESTION.answer(finished)
    assert [len(answer.tables[name].rows) for name in ("estimators", "points", "critical")] == [18, 1, 0]
    answer.figures["scales"][0](Figure())
