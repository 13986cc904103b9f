"""The statistics of a batch against the explicit D, and what a policy sees of them."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from metric_cases import batches, rows_of, sample
from oracle import assert_close, diffusion_matrix, flat

import rgd_ext
from rgd_ext import Fixed, Rayleigh, Spectral, Trace, linalg, ops
from rgd_ext.gradients import Moments
from rgd_ext.metric import Statistics, rounding
from rgd_ext.metric.stats import Grams


def test_stats_match_the_explicit_matrix():
    grads = sample()
    result, stats = rgd_ext.direction(grads, epsilon=Spectral(0.5))
    rows, step = rows_of(grads), flat(result)
    mean, matrix = rows.mean(0), diffusion_matrix(rows)
    assert stats.batch_size == 6
    assert_close(stats.grad_norm, mean.norm())
    assert_close(stats.direction_norm, step.norm())
    assert_close(stats.alignments, (rows - mean) @ mean)
    assert_close(stats.squared_norms, (rows - mean).square().sum(1))
    assert_close(stats.trace, matrix.trace())
    assert_close(stats.rayleigh, mean @ matrix @ mean / (mean @ mean))
    assert_close(stats.cosine, step @ mean / step.norm() / mean.norm())
    assert_close(stats.largest_eigenvalue, torch.linalg.eigvalsh(matrix)[-1])
    assert stats.rank == torch.linalg.matrix_rank(matrix)
    assert_close(stats.weights @ rows, step)
    assert_close(stats.effective_sample_size, 1 / stats.weights.square().sum())
    assert stats.negative_weights == (stats.weights < 0).sum()


@pytest.mark.parametrize("policy", [Fixed(0.1), Trace(0.5), Rayleigh(0.5)], ids=str)
def test_policies_that_do_without_the_gramian_agree_with_those_that_have_it(policy):
    grads = sample()
    result, stats = rgd_ext.direction(grads, epsilon=policy)
    again, full = rgd_ext.direction(grads, epsilon=lambda stats: policy(stats))
    assert stats.largest_eigenvalue is None
    assert stats.rank is None
    assert full.largest_eigenvalue is not None
    assert_close(flat(result), flat(again))
    for name in ("grad_norm", "trace", "rayleigh", "cosine", "direction_norm", "effective_sample_size"):
        assert_close(getattr(stats, name), getattr(full, name))
    assert "epsilon=" in repr(stats)


def test_what_tf32_leaves_of_equal_gradients_is_no_direction():
    tie = torch.full((1024,), 1 + 2.0**-11)  # halfway between two numbers of 11 bits
    rows = torch.stack([tie.nextafter(torch.zeros(())), tie])
    rounded = (rows.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32).double()
    gram = (rounded @ rounded.T).float()
    moments = torch.ops.rgd_ext.gram_moments(gram)

    def stats(dtype, device):
        return Statistics(2, Moments(*moments[:3]), Grams(gram, moments[3]), rounding(dtype, torch.device(device)))

    on_matrix_units = stats(torch.float32, "cuda")
    assert on_matrix_units.trace > 0
    assert on_matrix_units.rank == 0
    assert ops.sample_weights(*moments[:3], moments[0].new_ones(()), on_matrix_units.ulp)[0] == 0
    # Elsewhere, and in float64, so much is more than rounding.
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.float64, "cuda")):
        assert stats(dtype, device).ulp == torch.finfo(dtype).eps
        assert stats(dtype, device).rank == 1


def test_norms_of_large_models_keep_their_digits():
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's sums have fewer digits")
    grads = [torch.randn(2, 3_000_000), torch.randn(2, 7)]
    result, stats = rgd_ext.direction(grads, epsilon=Fixed(0.0))
    for norm in (stats.grad_norm, stats.direction_norm):
        torch.testing.assert_close(norm.double(), flat(result).double().norm(), rtol=5e-7, atol=0)


@settings(deadline=None, max_examples=60)
@given(batches)
@example([[-2.0, 0, 0], [-3.0, 0, 0], [-3.0, 1, 2]])  # the zero among its eigenvalues is of the size of their rounding
@example([[0.0, 0, -3], [0.0, 1, -3], [1.0, 0, -4]])  # and here of the size of the rounding of the entries
def test_two_forms_of_equation_3_agree_and_d_is_symmetric_positive_of_low_rank(rows):
    rows = torch.tensor(rows, dtype=torch.float64)
    b = len(rows)
    columns = torch.eye(3, dtype=torch.float64)
    matrix = torch.stack([flat(rgd_ext.ops.diffusion_mv(rows, column)) for column in columns], 1)
    difference = rows[:, None] - rows[None]
    pairwise = torch.einsum("ijr,ijs->rs", difference, difference) / (2 * b * b)
    assert torch.allclose(matrix, pairwise, atol=1e-12)
    assert torch.allclose(matrix, matrix.T, atol=1e-12)
    _, stats = rgd_ext.direction(rows)
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-12
    # Entries are rounded as products of gradients are, which may be larger than what is left of them in D.
    ulp = torch.finfo(matrix.dtype).eps * len(matrix) * rows.square().sum(1).max()
    assert torch.linalg.matrix_rank(matrix, atol=ulp.item(), hermitian=True) <= b - 1
    assert stats.rank <= b - 1


def test_a_policy_sees_all_of_the_batch_and_nothing_of_the_direction():
    grads, seen = sample(), []

    def policy(stats):
        seen.append(stats)
        return 0.5 / stats.trace

    _, stats = rgd_ext.direction(grads, epsilon=policy)
    (before,) = seen
    assert type(stats) is rgd_ext.Stats
    assert isinstance(stats, Statistics)
    assert not isinstance(before, rgd_ext.Stats)
    assert "batch_size=6" in repr(before)
    for name in ("grad_norm", "alignments", "squared_norms", "trace", "rayleigh", "largest_eigenvalue", "rank"):
        assert torch.equal(getattr(before, name), getattr(stats, name)), name
    for name in ("epsilon", "weights", "direction_norm", "cosine"):
        assert name not in dir(before), name


def test_what_a_policy_has_read_is_not_computed_again(monkeypatch):
    calls, eigenvalues = [], linalg.eigenvalues
    monkeypatch.setattr(linalg, "eigenvalues", lambda matrix: calls.append(matrix) or eigenvalues(matrix))
    _, stats = rgd_ext.direction(sample(), epsilon=lambda stats: 0.5 / stats.eigenvalues[-1])
    assert_close(stats.epsilon, 0.5 / stats.eigenvalues[-1])
    assert stats.rank == 5
    assert len(calls) == 1


@pytest.mark.parametrize("epsilon", [Spectral(0.5), Trace(0.5)], ids=str)
def test_a_dict_has_numbers_of_the_batch_and_arrays_of_its_samples(epsilon):
    _, stats = rgd_ext.direction(sample(), epsilon=epsilon)
    found = stats.to_dict()
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    assert found["batch_size"] == 6
    assert {*found} == {"batch_size", *numbers, *arrays}
    assert {*arrays} == {"sample_norms", "alignments", "squared_norms", "aligned", "weights"}
    for name, value in (numbers | arrays).items():
        expected = getattr(stats, name)
        if expected is None:
            assert np.isnan(value).all(), name
            continue
        np.testing.assert_array_equal(value, expected.double().numpy(), err_msg=name)
    assert {"epsilon", "trace", "cosine", "noise_scale"} < {*numbers}
    assert all(array.shape == (6,) and array.dtype == np.float64 for array in arrays.values())
    has_gram = isinstance(epsilon, Spectral)
    assert np.isnan(found["rank"]) != has_gram


def test_a_dict_keeps_its_numbers_when_the_tensors_change():
    _, stats = rgd_ext.direction(sample(), epsilon=0.0)
    found = stats.to_dict()
    before = found["weights"].copy()
    stats.weights.zero_()
    np.testing.assert_array_equal(found["weights"], before)
