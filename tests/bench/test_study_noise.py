"""Estimates of the noise scale, the branches, and the predictions of the critical batch size."""

import copy
from itertools import pairwise, product
from math import exp, log

import numpy as np
import pytest
import torch
from dense import Dense, classifier, images
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch.nn.functional import cross_entropy

import rgd_ext
from bench.studying.data import Sources
from bench.studying.noise import estimates as noise_scales
from bench.studying.noise import predictions
from bench.studying.noise.accuracy import points, ratios
from bench.studying.noise.branches import branch, times
from bench.studying.noise.critical import numbers
from bench.studying.noise.estimates import ESTIMATORS, PER_SAMPLE, error, errors, estimates
from bench.studying.noise.figure import draw
from bench.studying.noise.hyperbola import fitted
from bench.studying.noise.scales import gramian, scales, signs
from bench.studying.noise.searches import SIZES, branches
from bench.studying.noise.trunk import POINTS, TRUNK, checkpoint_of
from bench.studying.question import Finished, Line, Scope
from bench.studying.questions.noise import ENDS_OF, QUESTION
from bench.studying.task import task_of
from bench.studying.training import batches_of, initial_model

QUICK = QUESTION.plan(Finished(), Scope(quick=True, data=("digits",)))
SOURCES = Sources()  # the trunks are kept for this object
TWO_BATCH = [(parts, known) for parts, known in ESTIMATORS.values() if parts]


@pytest.fixture
def model():
    return classifier()


@pytest.fixture
def samples():
    return images(12)


@pytest.fixture
def gradients():
    """Of five samples with a mean, (5, 3)."""
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 1


@pytest.mark.parametrize(("parts", "known"), [(2, 1), (2, 2), (4, 1), (4, 4)])
def test_estimates_have_no_bias(gradients, parts, known):
    few = gradients[:4]
    every = torch.tensor(list(product(range(4), repeat=4)))  # all batches of four, which are equally likely
    found = estimates((few @ few.T)[every[:, :, None], every[:, None, :]], parts, known)
    mean = few.mean(0)
    expected = torch.stack([(few - mean).square().sum(1).mean(), mean @ mean])
    torch.testing.assert_close(found.mean(1), expected)


@pytest.mark.parametrize(("parts", "known"), TWO_BATCH)
def test_estimates_solve_the_two_equations_of_the_batch_sizes(gradients, parts, known):
    batch = gradients[torch.arange(16) % 5]
    of_parts = [part.mean(0) for part in batch.split(16 // parts)][:known]
    norms = [np.mean([part @ part for part in of_parts]), batch.mean(0) @ batch.mean(0)]
    expected = np.linalg.solve([[parts / 16, 1], [1 / 16, 1]], norms)
    np.testing.assert_allclose(estimates((batch @ batch.T)[None], parts, known)[:, 0], expected)


def test_estimates_from_parts_of_one_sample_are_those_of_the_package(model, samples):
    index = torch.tensor([3, 1, 4, 1, 5, 9])
    block = gramian(model, samples)[index][:, index]
    with rgd_ext.observe(model.double()) as handle:
        cross_entropy(model(samples.inputs[index].double()), samples.labels[index]).backward()
    expected = torch.stack([handle.stats.unbiased_trace, handle.stats.unbiased_squared_grad_norm])
    torch.testing.assert_close(estimates(block[None], 6, 6)[:, 0], expected)


def test_per_sample_gradients_have_the_least_error_of_the_trace(gradients):
    found = errors(gradients @ gradients.T, 16, 400, torch.Generator().manual_seed(0))
    others = [each["trace"] for name, each in found.items() if name != PER_SAMPLE]
    assert found[PER_SAMPLE]["trace"] < min(others)
    assert found["all 8 parts"]["trace"] < found["both halves"]["trace"] < found["one half"]["trace"]


def test_the_error_of_a_sum_is_that_of_a_batch_over_the_root_of_their_number():
    noise = torch.randn(2, 30000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = error(1 + torch.tensor([[0.1], [0.2]]) * noise)
    assert [found["trace"], found["squared_norm"]] == pytest.approx([0.1, 0.2], rel=0.02)
    assert found["noise_scale"] == pytest.approx(0.05**0.5, rel=0.02)
    assert found["quantiles"][3] == pytest.approx(found["noise_scale"] / 30**0.5, rel=0.1)


def test_error_of_the_truth_is_zero():
    assert error(torch.ones(2, 3)) == {"trace": 0, "squared_norm": 0, "noise_scale": 0, "quantiles": [0, 0]}


def test_scales_are_those_of_the_dense_matrices(model, samples):
    # With all multiples of unit vectors as probes, Hutchinson's estimator is exact.
    found = scales(model, samples, gramian(model, samples), 12**0.5 * torch.eye(12, dtype=torch.float64))
    dense = Dense(model, samples)
    gradients, hessian = dense.gradients.numpy(), dense.hessian.numpy()
    mean, covariance = gradients.mean(0), np.cov(gradients.T, bias=True)
    assert found["trace"] == pytest.approx(np.trace(covariance))
    assert found["squared_norm"] == pytest.approx(mean @ mean)
    assert found["hessian_trace"] == pytest.approx(np.trace(hessian @ covariance))
    assert found["curvature"] == pytest.approx(mean @ hessian @ mean)
    outputs = model.double()(samples.inputs.double())
    assert found["loss"] == pytest.approx(cross_entropy(outputs, samples.labels).item())


def test_signs_are_uncorrelated():
    found = signs(20000, 3, seed=0)
    assert set(found.unique().tolist()) == {-1, 1}
    torch.testing.assert_close(found.T @ found / 20000, torch.eye(3).double(), atol=0.03, rtol=0)


def test_trunk_is_sgd_at_a_constant_rate():
    config = QUICK[0]
    training = TRUNK | config
    task = task_of(training, SOURCES)
    model = initial_model(training, task)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _, batch in zip(range(POINTS[0]), batches_of(training, task.train), strict=False):
        optimizer.zero_grad()
        cross_entropy(model(batch.inputs), batch.labels).backward()
        optimizer.step()
    found = checkpoint_of(config | {"step": POINTS[0]}, SOURCES)
    for expected, actual in zip(model.parameters(), found.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert found.running > 0


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


def line(part, seed, outcome, **config):
    trunk = {"data": "digits", "model": "MLP", "labels": "clean", "step": 200, "seed": seed}
    return Line(trunk | config | {"part": part}, outcome, 0.0, {})


SCALES = {"trace": 30.0, "squared_norm": 0.5, "hessian_trace": 8.0, "curvature": 0.2, "loss": 1.0}


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


def test_draws_depend_on_the_seed(monkeypatch):
    monkeypatch.setattr(noise_scales, "errors", lambda _, __, ___, generator: generator.initial_seed())
    found = [QUESTION.run(QUICK[0] | {"seed": seed}, SOURCES)["errors"]["16"] for seed in (3, 4)]
    assert found == [3, 4]


def test_small_batches_may_take_more_steps():
    assert times(8)[-1] > 10 * times(512)[-1]


def test_ends_are_those_of_all_paths():
    found = QUESTION.run(QUICK[0] | BRANCH | {"part": "branch", "batch_size": ENDS_OF}, SOURCES)
    assert found["ends"]["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert found["ends"]["loss"] <= BRANCH["goal"] * QUESTION.run(QUICK[0], SOURCES)["loss"]


def test_noise_scale_is_known_when_its_error_is_a_fifth():
    errors = {str(size): {name: {"noise_scale": 3.0} for name in ESTIMATORS} for size in (16, 64, 256)}
    errors["64"] = {name: {"noise_scale": 0.4 if name == PER_SAMPLE else 1.2} for name in ESTIMATORS}
    finished = Finished()
    finished.add(line("estimates", 0, SCALES | {"errors": errors}))
    finished.add(line("branch", 0, {"steps": 3.0, "loss": 1.0}, goal=0.7, batch_size=8))
    (point,) = points(finished)
    assert point.batches(64) == pytest.approx([4])
    assert point.batches(64, "one half") == pytest.approx([36])
    assert ratios([point], 64, "one half") == pytest.approx([9])
    assert point.scales() == pytest.approx([60])


def test_answer_needs_neither_lines_nor_branches():
    finished = Finished()
    figure, _ = QUESTION.answer(finished).figures["scales"]
    figure(Figure())
    finished.add(Line(QUICK[0], QUESTION.run(QUICK[0], SOURCES), 0.0, {}))
    answer = QUESTION.answer(finished)
    assert [len(answer.tables[name].rows) for name in ("estimators", "points", "critical")] == [18, 1, 0]
    answer.figures["scales"][0](Figure())
