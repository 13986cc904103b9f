"""Estimates of the noise scale, and the scales that they are compared with."""

from itertools import product

import numpy as np
import pytest
import torch
from dense import Dense
from noise_cases import QUICK, SCALES, SOURCES, line
from torch.nn.functional import cross_entropy

import rgd_ext
from bench.studying.noise import estimates as noise_scales
from bench.studying.noise.accuracy import points, ratios
from bench.studying.noise.estimates import ESTIMATORS, PER_SAMPLE, error, errors, estimates
from bench.studying.noise.scales import gramian, scales, signs
from bench.studying.noise.trunk import POINTS, TRUNK, checkpoint_of
from bench.studying.question import Finished
from bench.studying.questions.noise import QUESTION
from bench.studying.task import task_of
from bench.studying.training import batches_of, initial_model

TWO_BATCH = [(parts, known) for parts, known in ESTIMATORS.values() if parts]


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


def test_draws_depend_on_the_seed(monkeypatch):
    monkeypatch.setattr(noise_scales, "errors", lambda _, __, ___, generator: generator.initial_seed())
    found = [QUESTION.run(QUICK[0] | {"seed": seed}, SOURCES)["errors"]["16"] for seed in (3, 4)]
    assert found == [3, 4]


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
