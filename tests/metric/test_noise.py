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
        batch_size = (2, 3, 4)[step % 3]
        (stats,) = statistics(batch_size, 1)
        noise.add(batch_size, stats.squared_grad_norm.item(), stats.trace.item())
    expected = (COVARIANCE.trace() / MEAN.square().sum()).item()
    # Over seeds it spreads by 0.15; without the factor B / (B - 1) it would be 0.56 too small.
    assert noise.value == pytest.approx(expected, rel=0.4)


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


def test_small_batches_among_large_ones_add_little_noise():
    expected = (COVARIANCE.trace() / MEAN.square().sum()).item()
    errors = {2: [], 64: []}
    for _ in range(40):
        for size, found in errors.items():
            noise = NoiseScale()
            for batch_size in (64, 64, 64, size):
                (stats,) = statistics(batch_size, 1)
                noise.add(batch_size, stats.squared_grad_norm.item(), stats.trace.item())
            found.append((math.log(noise.value / expected)) ** 2)
    assert sum(errors[2]) < 5 * sum(errors[64])  # some 1.3 times; 70 to 2000 times if all batches weighed the same


def test_sizes_weigh_by_degrees_of_freedom_and_pairs():
    noise, batches = NoiseScale(), [(2, 2.0, 3.0), (8, 10.0, 1.0)]
    for batch in batches:
        noise.add(*batch)
    decays = math.exp(-1 / HORIZON), 1
    traces = [b / (b - 1) * trace for b, _, trace in batches]
    norms = [squared - trace / b for (b, squared, _), trace in zip(batches, traces, strict=True)]

    def mean(values, weights):
        weights = [decay * weight for decay, weight in zip(decays, weights, strict=True)]
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    pairs = [b * (b - 1) for b, *_ in batches]
    assert noise.value == pytest.approx(mean(traces, [1, 7]) / mean(norms, pairs))
    of_batches = [trace / b for (b, *_), trace in zip(batches, traces, strict=True)]
    assert noise.signal_to_noise == pytest.approx(mean(norms, pairs) / mean(of_batches, pairs))


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
