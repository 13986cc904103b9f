"""The direction: named properties, and the explicit D."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_cases import PAIRS, POLICIES, batches, number_of, rows_of, sample
from oracle import assert_close, direction, epsilon, flat

import rgd_ext
from rgd_ext import Rayleigh, Spectral, Trace, metric
from rgd_ext.metric import INVERSES


def test_every_policy_is_among_the_cases():
    assert {type(policy) for policy in POLICIES} == set(metric.POLICIES)


@pytest.mark.parametrize(("policy", "inverse"), PAIRS, ids=str)
def test_direction_matches_the_explicit_matrix(policy, inverse):
    grads = sample()
    result, stats = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    name, number, rows = type(policy).__name__, number_of(policy), rows_of(grads)
    assert_close(flat(result), direction(rows, name, number, inverse))
    assert_close(stats.epsilon, torch.as_tensor(epsilon(rows, name, number), dtype=torch.float64))
    assert [r.shape for r in result] == [g.shape[1:] for g in grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", [Spectral(0.5), Trace(0.5), Rayleigh(0.5)], ids=str)
def test_direction_in_lower_precision(policy, dtype):
    grads = sample(dtype)
    result, _ = rgd_ext.direction(grads, epsilon=policy)
    assert_close(flat(result), direction(rows_of(grads), type(policy).__name__), dtype)


@settings(deadline=None, max_examples=60)
@given(batches, st.sampled_from(PAIRS))
def test_weights_sum_to_one(rows, pair):
    policy, inverse = pair
    _, stats = rgd_ext.direction(torch.tensor(rows, dtype=torch.float64), epsilon=policy, inverse=inverse)
    assert torch.allclose(stats.weights.sum(), torch.ones((), dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(("policy", "inverse"), PAIRS, ids=str)
def test_order_of_samples_does_not_matter(policy, inverse):
    grads, order = sample(), torch.randperm(6)
    result, _ = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    permuted, _ = rgd_ext.direction([g[order] for g in grads], epsilon=policy, inverse=inverse)
    assert_close(flat(permuted), flat(result))


@pytest.mark.parametrize(("policy", "inverse"), PAIRS, ids=str)
def test_every_sample_twice_changes_nothing(policy, inverse):
    grads = sample()
    result, _ = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    doubled, _ = rgd_ext.direction([torch.cat([g, g]) for g in grads], epsilon=policy, inverse=inverse)
    assert_close(flat(doubled), flat(result))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("policy", "inverse"), PAIRS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_identical_samples_give_the_plain_gradient_bitwise(batch, policy, inverse, dtype):
    sample = torch.randn(1, 1000).to(dtype)
    grads = sample.expand(batch, -1).contiguous()
    (result,), stats = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    assert stats.epsilon == 0
    assert torch.equal(result, rgd_ext.ops.moments(grads)[0][0])
    assert stats.effective_sample_size == pytest.approx(batch)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_rounding_noise_is_not_amplified(policy):
    grads = torch.randn(1, 1000) * (1 + 1e-7 * torch.randn(32, 1))
    (result,), stats = rgd_ext.direction(grads, epsilon=policy)
    assert stats.epsilon == 0
    assert_close(result, grads.mean(0))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_zero_gradients_give_zero(policy):
    (result,), stats = rgd_ext.direction(torch.zeros(4, 3), epsilon=policy)
    assert not result.any()
    assert stats.rayleigh == 0
    assert stats.cosine == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inverse", INVERSES)
def test_epsilon_zero_gives_the_mean_bitwise(inverse, dtype):
    grads = sample(dtype)
    result, _ = rgd_ext.direction(grads, epsilon=0.0, inverse=inverse)
    mean = rgd_ext.ops.moments(grads)[0]
    assert all(torch.equal(a, b) for a, b in zip(result, mean, strict=True))


def test_exact_inverse_allows_what_the_weak_field_does_not():
    rows = rows_of(sample())
    (step,), _ = rgd_ext.direction(rows, epsilon=Spectral(5.0), inverse="exact")
    assert_close(step, direction(rows, "Spectral", 5.0, "exact"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("policy", "inverse"), PAIRS, ids=str)
def test_gradients_that_are_not_finite_flow_through(policy, inverse, value):
    grads = sample(torch.float32)
    grads[0][2, 1] = value
    result, _ = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    assert not flat(result).isfinite().all()
