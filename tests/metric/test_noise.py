"""The gradient noise scale: its estimates have no bias, and running means of them are divided."""

import math

import pytest
import torch

import rgd_ext
from rgd_ext.metric.noise import HORIZON, NoiseScale

D = 5
MEAN = torch.linspace(-1, 1, D, dtype=torch.float64)
ROOT = torch.diag(torch.arange(1.0, D + 1, dtype=torch.float64)) / 2
ROOT[0, 1:] = 0.3
COVARIANCE = ROOT @ ROOT.T


def gradients(batch_size):
    """Per-sample gradients of a known mean and covariance, which are not normal."""
    noise = torch.empty(batch_size, D, dtype=torch.float64).exponential_() - 1
    return MEAN + noise @ ROOT.T


def statistics(batch_size, batches):
    return [rgd_ext.direction(gradients(batch_size), epsilon=0.0)[1] for _ in range(batches)]


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_numerator_and_denominator_have_no_bias(batch_size):
    found = statistics(batch_size, 4000)
    for estimates, expected in (
        (torch.stack([stats.unbiased_trace for stats in found]), COVARIANCE.trace()),
        (torch.stack([stats.unbiased_squared_grad_norm for stats in found]), MEAN.square().sum()),
    ):
        error = (estimates.mean() - expected) / (estimates.std() / len(estimates) ** 0.5)
        assert error.abs() < 4  # standard errors


def test_the_bias_of_the_uncorrected_estimates_would_be_seen():
    found = statistics(3, 4000)
    for estimates, expected in (
        (torch.stack([stats.trace for stats in found]), COVARIANCE.trace()),
        (torch.stack([stats.squared_grad_norm for stats in found]), MEAN.square().sum()),
    ):
        error = (estimates.mean() - expected) / (estimates.std() / len(estimates) ** 0.5)
        assert error.abs() > 10


def test_one_sample_has_no_noise_scale():
    _, stats = rgd_ext.direction(torch.randn(1, 4))
    assert stats.noise_scale.isnan()


def test_the_noise_scale_does_not_depend_on_the_scale_of_the_loss():
    rows = gradients(8)
    first, scaled = (rgd_ext.direction(s * rows)[1].noise_scale for s in (1, 2.0**10))
    assert torch.equal(first, scaled)


def test_batches_of_all_sizes_find_the_noise_scale():
    noise = NoiseScale()
    for step in range(20 * HORIZON):
        batch_size = (4, 8, 32)[step % 3]
        (stats,) = statistics(batch_size, 1)
        noise.add(batch_size, stats.squared_grad_norm.item(), stats.trace.item())
    expected = (COVARIANCE.trace() / MEAN.square().sum()).item()
    # Over seeds it spreads by 0.06; without the factor B / (B - 1) it would be 0.22 too small.
    assert noise.value == pytest.approx(expected, rel=0.15)


def test_running_means_are_divided_and_not_ratios_averaged():
    noise, batches = NoiseScale(), [(4, 2.0, 3.0), (4, 10.0, 1.0)]
    for batch in batches:
        noise.add(*batch)
    decay = math.exp(-1 / HORIZON)
    traces = [4 / 3 * trace for _, _, trace in batches]
    norms = [squared - trace / 4 for (_, squared, _), trace in zip(batches, traces, strict=True)]
    expected = (decay * traces[0] + traces[1]) / (decay * norms[0] + norms[1])
    assert noise.value == pytest.approx(expected)
    assert noise.signal_to_noise == pytest.approx(4 / expected)


@pytest.mark.parametrize("batch", [(1, 2.0, 0.0), (4, math.nan, 1.0), (4, math.inf, 1.0), (4, 1.0, math.inf)])
def test_batches_that_tell_nothing_are_left_out(batch):
    noise = NoiseScale()
    noise.add(*batch)
    assert noise.value is None
    noise.add(4, 2.0, 3.0)
    noise.add(*batch)
    assert noise.value == pytest.approx(4.0)


def test_no_value_where_noise_hides_the_gradient():
    noise = NoiseScale()
    noise.add(2, 1.0, 3.0)
    assert noise.value is None
    assert noise.signal_to_noise is None


def test_equal_gradients_have_a_noise_scale_of_zero_and_no_ratio():
    noise = NoiseScale()
    noise.add(4, 2.0, 0.0)
    assert noise.value == 0
    assert noise.signal_to_noise is None
