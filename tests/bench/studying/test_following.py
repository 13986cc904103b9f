"""Paths of SGD, flows and distances, against closed forms, enumeration and `rgd_ext.geometry`."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, linear

import rgd_ext
from bench.studying.data import Sources
from bench.studying.following import curves
from bench.studying.following.flows import Relativistic, integrate, modified
from bench.studying.following.paths import SHUFFLED, WITH_REPLACEMENT, Average, average, noise, shuffled
from bench.studying.following.problems import CHANNELS, Problem, Random, least_squares, quadratic, small_cnn
from bench.studying.following.shares import Setting, fractions, settings
from bench.studying.inference import Interval
from bench.studying.question import Finished, Line, Scope
from bench.studying.questions import follow
from rgd_ext.geometry import gradient_flow, rgd_flow, sgd_paths


def quadratics(samples: int = 6) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    """f_i = x^T A_i x / 2 + b_i^T x, the A_i (N, 2, 2) and the b_i (N, 2)."""
    random = Random(0)
    factors = random.normal(samples, 2, 2)
    a, b = factors @ factors.mT / 2, random.normal(samples, 2)
    return Problem(lambda x, a, b: x @ a @ x / 2 + b @ x, (a, b), random.normal(2), 10), a, b


def affine_flow(matrix: torch.Tensor, shift: torch.Tensor, x0: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The solution of dx/dt = -(matrix x + shift), by a matrix exponential; (T, d)."""
    d = len(x0)
    augmented = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    augmented[:d, :d], augmented[:d, d] = -matrix, -shift
    start = torch.cat([x0, torch.ones(1, dtype=torch.float64)])
    return torch.stack([(torch.linalg.matrix_exp(augmented * t) @ start)[:d] for t in times])


@pytest.fixture(scope="module")
def regression() -> Problem:
    """One object for several tests, so that the curves that are kept for it are integrated once."""
    return least_squares(0)


TIMES = torch.linspace(0.5, 4, 6, dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_modified_flow_of_shuffled_epochs_is_the_mean_over_all_batches_of_its_definition(batch_size):
    problem, a, b = quadratics()
    lr, n = 0.1, problem.size
    # The gradient of (lr / 4) |grad f_B|^2 is (lr / 2) A_B (A_B x + b_B).
    batches = [list(batch) for batch in combinations(range(n), batch_size)]
    means = [(a[batch].mean(0), b[batch].mean(0)) for batch in batches]
    matrix = a.mean(0) + lr / 2 * sum(a_b @ a_b for a_b, _ in means) / len(means)
    shift = b.mean(0) + lr / 2 * sum(a_b @ b_b for a_b, b_b in means) / len(means)
    share = torch.tensor([(n - batch_size) / ((n - 1) * batch_size)], dtype=torch.float64)
    (found,) = integrate(modified(problem, torch.full((1,), lr), share), problem.x0, 1, TIMES)
    assert torch.allclose(found, affine_flow(matrix, shift, problem.x0, TIMES), rtol=0, atol=1e-6)


def test_modified_flow_of_gradient_descent_adds_half_a_step_of_hessian_times_gradient():
    problem, a, b = quadratics()
    lr = torch.tensor([0.05, 0.2], dtype=torch.float64)
    found = integrate(modified(problem, lr, torch.zeros(2)), problem.x0, 2, TIMES)
    for flow, rate in zip(found, lr, strict=True):
        step = torch.eye(2, dtype=torch.float64) + rate / 2 * a.mean(0)
        assert torch.allclose(flow, affine_flow(step @ a.mean(0), step @ b.mean(0), problem.x0, TIMES), atol=1e-6)


def test_modified_flows_are_listed_by_rate_and_batch_size(regression):
    gradients = torch.func.jacrev(regression.losses)(regression.x0)
    of_pairs = torch.stack([(g + h) / 2 for g, h in combinations(gradients, 2)]).square().sum(1).mean()
    square = gradients.mean(0).square().sum()
    share = (of_pairs - square) / gradients.T.cov(correction=0).trace()
    found = curves.modified_flows(regression)
    assert len(found) == len(curves.RATES) * len(curves.BATCH_SIZES)
    lr = torch.full((1,), curves.learning_rate(regression, 0.25), dtype=torch.float64)
    (flow,) = integrate(modified(regression, lr, share[None]), regression.x0, 1, curves.times(regression))
    assert torch.allclose(found[0.25, 2], flow, rtol=0, atol=1e-5)


def test_modified_flow_is_an_order_closer_to_gradient_descent_than_the_gradient_flow(regression):
    flow = curves.relatives(regression).gradient

    def errors(rate: float) -> tuple[float, float]:
        descent = curves.gradient_descent(regression, rate)
        lr = torch.tensor([curves.learning_rate(regression, rate)])
        (closer,) = integrate(
            modified(regression, lr.double(), torch.zeros(1)), regression.x0, 1, curves.times(regression)
        )
        return (descent - flow).norm().item(), (descent - closer).norm().item()

    coarse, fine = errors(0.1), errors(0.05)
    assert 1.8 < coarse[0] / fine[0] < 2.2
    assert 3.6 < coarse[1] / fine[1] < 4.4


def test_flows_of_eq_10_are_those_of_geometry(regression):
    found = curves.relatives(regression)
    times = torch.cat([torch.zeros(1, dtype=torch.float64), curves.times(regression)[[1, 4]]])
    constant, options = -0.4 / found.largest_eigenvalue, {"rtol": 1e-7, "atol": 1e-8}
    for flow, expected in (
        (found.gradient, gradient_flow(regression.losses, regression.x0, times, **options)),
        (found.spectral[0.6], rgd_flow(regression.losses, regression.x0, times, rgd_ext.Spectral(0.6), **options)),
        (found.constant[-0.4], rgd_flow(regression.losses, regression.x0, times, constant, **options)),
    ):
        assert torch.allclose(flow[[1, 4]], expected[1:], rtol=0, atol=1e-5)
    assert (found.gradient - found.constant[-0.4])[4].norm() > 1e-3


def test_a_flow_of_twice_the_speed_is_at_each_time_where_the_gradient_flow_is_at_twice_the_time(regression):
    found = curves.relatives(regression)
    assert torch.allclose(found.rescaled[2.0][:10], found.gradient[1::2], rtol=0, atol=1e-5)
    assert (found.rescaled[0.9] - found.gradient)[4].norm() > 1e-3


def test_a_flow_stops_where_its_constant_epsilon_leaves_eq_6():
    # g_i = a_i (x - 1) + x, so that D = var(a) (x - 1)^2 grows 36-fold on the way from 1.1 to the minimum at 0.4.
    a = torch.tensor([0.2, 1.0], dtype=torch.float64) / 0.9
    start, minimum = torch.tensor([1.1], dtype=torch.float64), torch.full((4, 1), 0.4, dtype=torch.float64)
    problem = Problem(lambda x, a: (a * (x - 1) ** 2 / 2 + x**2 / 2).sum(), (a,), start, 10)
    fractions = torch.tensor([0.02, 0.05, -0.05, 0.5], dtype=torch.float64)
    constant = torch.tensor([True, True, True, False])

    velocity = Relativistic(problem, fractions, constant, torch.ones(4))
    assert not velocity(start.expand(4, 1)).eq(0).any()
    assert not velocity.stopped.any()
    velocity(minimum)
    assert velocity.stopped.tolist() == [False, True, True, False]
    assert velocity(start.expand(4, 1)).eq(0).flatten().tolist() == [False, True, True, False]

    velocity = Relativistic(problem, fractions, constant, torch.ones(4))
    flows = integrate(velocity, start, 4, torch.tensor([1.0, 20.0], dtype=torch.float64))
    assert velocity.stopped[[0, 2, 3]].tolist() == [False, True, False]
    assert torch.allclose(flows[[0, 3], -1], minimum[:2], atol=1e-3)
    assert flows[2, -1].item() > 0.5


@pytest.mark.parametrize("sampling", [WITH_REPLACEMENT, SHUFFLED])
def test_mean_of_sgd_is_gradient_descent_where_the_hessians_of_all_samples_are_equal(sampling):
    problem = quadratic(0)
    mean = curves.sgd(problem, 1.0, 2, sampling, 2000, 0)
    floor = mean.noise.mean().item()
    assert abs(mean.squared_distance(curves.gradient_descent(problem, 1.0))) < 2 * floor
    assert mean.squared_distance(curves.relatives(problem).gradient) > 4 * floor


def test_paths_with_replacement_are_those_of_geometry(regression):
    found = average(regression, 0.1, 4, WITH_REPLACEMENT, 5, 6, 2, 3)
    paths = sgd_paths(
        regression.losses, regression.x0, 6, lr=0.1, batch_size=4, paths=5, generator=torch.Generator().manual_seed(3)
    )
    assert torch.allclose(found.mean, paths.mean(0)[[2, 4, 6]], rtol=0, atol=1e-12)
    spread = np.array([np.trace(np.cov(paths[:, step].T)) for step in (2, 4, 6)])
    assert np.allclose(found.noise, spread / 5)


def test_squared_distance_from_the_expectation_is_zero_on_average():
    random = Random(0)
    found = []
    for _ in range(400):
        x = 3 + random.normal(5, 2)
        average = Average(x.mean(0)[None], noise(x)[None])
        found.append(average.squared_distance(torch.full((1, 2), 3.0, dtype=torch.float64)))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error
    assert 10 * error < 2 / 5  # what it would be without the correction


@pytest.mark.parametrize("batch_size", [1, 3, 4, 12])
def test_shuffled_epochs_use_each_sample_once(batch_size):
    batches = shuffled(12, batch_size, 7, torch.Generator().manual_seed(0))
    epochs = [torch.cat(list(islice(batches, 12 // batch_size)), 1) for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort(1).values, torch.arange(12).expand(7, 12))
    if batch_size < 12:
        assert not torch.equal(epochs[0], epochs[1])
        assert not torch.equal(epochs[0][0], epochs[0][1])


def test_convolution_of_patches_is_that_of_torch():
    sources = Sources()
    problem = small_cnn(0, sources)
    chosen = Random(0).chosen(64, 1000)
    train = sources.split("digits", 1000).train
    images, labels = train.inputs[chosen].double(), train.labels[chosen]
    w1, b1, w2, b2 = problem.x0.split([9 * CHANNELS, CHANNELS, 40 * CHANNELS, 10])
    hidden = torch.tanh(conv2d(images, w1.view(CHANNELS, 1, 3, 3), b1, stride=2, padding=1))
    outputs = linear(avg_pool2d(hidden, 2).flatten(1), w2.view(10, -1), b2)
    assert torch.allclose(problem.losses(problem.x0), cross_entropy(outputs, labels, reduction="none"))


@pytest.fixture(scope="module")
def quick() -> Finished:
    finished, sources = Finished(), Sources()
    for config in follow.plan(finished, Scope(True, ("digits",))):
        finished.add(Line(config, follow.run(config, sources), 0.0, {}))
    return finished


def test_a_run_depends_on_its_configuration_only(quick):
    first = next(iter(quick))
    torch.rand(3)
    assert follow.run(first.config, Sources()) == first.outcome
    assert first.outcome["loss_at_end"] < first.outcome["loss_at_start"]


def test_quick_plan_gives_tables_numbers_and_a_figure(quick):
    figure = pytest.importorskip("matplotlib.figure")
    answer = follow.answer(quick)
    for table in answer.tables.values():
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}
    assert int(answer.numbers["settings"]) == len(quick)
    ((draw, height),) = answer.figures.values()
    canvas = figure.Figure(figsize=(10, height), layout="constrained")
    draw(canvas)
    assert len(canvas.axes) == 2


def test_full_plan_has_every_setting_once_for_each_seed():
    planned = follow.plan(Finished(), Scope(False, ("digits",)))
    unique = {tuple(config.items()) for config in planned}
    by_seed = Counter(tuple(value for name, value in config.items() if name != "seed") for config in planned)
    assert len(unique) == len(planned)
    assert set(by_seed.values()) == {len(follow.SEEDS)}
    assert {config["problem"] for config in planned} == follow.PROBLEMS.keys()
    assert all((config["paths"] == 1) == (config["batch_size"] == 64) for config in planned)


def line(seed: int, squared: dict[str, float | None], noise: float) -> Line:
    config = {"problem": "p", "lr": 0.1, "batch_size": 2, "sampling": SHUFFLED, "seed": seed}
    return Line(config, {"squared_distances": squared, "noise": noise}, 0.0, {})


def test_share_compares_roots_of_means_over_seeds():
    finished = Finished()
    flows = {f"c {c:+g}": 9.0 for c in curves.FRACTIONS}
    finished.add(line(0, {"gradient flow": 1.0} | flows | {"c -0.2": 0.5}, 0.5))
    finished.add(line(1, {"gradient flow": 7.0} | flows | {"c -0.2": -0.1}, 0.5))
    (setting,) = settings(finished)
    assert setting.best(fractions(curves.FRACTIONS))[0] == -0.2
    share = setting.share("c -0.2")
    assert share.mean == pytest.approx(1 - np.sqrt(0.4 / 8))
    assert share.low == pytest.approx(1 - np.sqrt(0.5))
    assert share.high == 1
    assert setting.best(fractions(curves.MAGNITUDES)) == (None, Interval(0, 0, 0))


def test_a_curve_that_is_near_by_chance_explains_nothing():
    finished = Finished()
    for seed in range(3):
        # Each seed is near another curve, and far from the others.
        near = {f"c {c:+g}": 0.25 if at == seed else 4.0 for at, c in enumerate((-0.1, 0.1, 0.2))}
        finished.add(line(seed, {"gradient flow": 4.0} | near, 0.1))
    (setting,) = settings(finished)
    c, share = setting.best(fractions((-0.1, 0.1, 0.2)))
    assert c == -0.1
    assert setting.share("c -0.1").mean > 0.1
    assert share.mean == 0


def test_settings_within_the_noise_and_flows_that_stopped_are_left_out():
    squared = {"gradient flow": 1.0, "c +0.2": None, "c -0.2": 0.5}
    assert not Setting("p", 0.1, 2, SHUFFLED, [line(0, squared, 2.0)]).resolved
    clear = Setting("p", 0.1, 2, SHUFFLED, [line(0, squared, 0.5), line(1, squared | {"c +0.2": 0.0}, 0.5)])
    assert clear.resolved
    assert clear.best(fractions((-0.2, 0.2)))[0] == -0.2
    assert not Setting("p", 0.1, 2, SHUFFLED, [line(0, {"gradient flow": None}, 0.5)]).resolved
