"""Policies, statistics and the direction: named properties, and the explicit D."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import assert_close, diffusion_matrix, direction, epsilon, flat

import rgd_ext
from rgd_ext import Fixed, Rayleigh, Spectral, Trace, ops
from rgd_ext.gradients import DenseGradients
from rgd_ext.metric import Stats, rounding

POLICIES = [Fixed(0.05), Spectral(0.5), Spectral(-0.5), Trace(0.5), Trace(-0.9), Rayleigh(0.5), Rayleigh(-2.0)]
INVERSES = ["weak-field", "exact"]
SHAPES = [(6, 3), (6, 2, 4), (6,)]


def sample(dtype=torch.float64, scale=1.0):
    return [(torch.randn(s) * scale + 0.3).to(dtype) for s in SHAPES]


def rows_of(grads):
    return torch.cat([g.reshape(len(g), -1) for g in grads], 1).double()


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_direction_matches_the_explicit_matrix(policy, inverse):
    grads = sample()
    result, stats = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    fraction = policy.value if isinstance(policy, Fixed) else policy.fraction
    name, rows = type(policy).__name__, rows_of(grads)
    assert_close(flat(result), direction(rows, name, fraction, inverse))
    assert_close(stats.epsilon, torch.as_tensor(epsilon(rows, name, fraction), dtype=torch.float64))
    assert [r.shape for r in result] == [g.shape[1:] for g in grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", [Spectral(0.5), Trace(0.5), Rayleigh(0.5)], ids=str)
def test_direction_in_lower_precision(policy, dtype):
    grads = sample(dtype)
    result, _ = rgd_ext.direction(grads, epsilon=policy)
    assert_close(flat(result), direction(rows_of(grads), type(policy).__name__), dtype)


@pytest.mark.parametrize("loss_scale", [8.0, lambda: 8.0], ids=["number", "function"])
def test_a_fixed_epsilon_follows_the_scale_of_the_loss(loss_scale):
    grads = sample()
    expected, _ = rgd_ext.direction(grads, epsilon=0.05)
    result, _ = rgd_ext.direction([8.0 * g for g in grads], epsilon=Fixed(0.05, loss_scale))
    assert_close(flat(result), 8.0 * flat(expected))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match=f"loss_scale={scale}"):
        Fixed(0.05, scale)
    with pytest.raises(ValueError, match=f"loss_scale={scale}"):
        rgd_ext.direction(sample(), epsilon=Fixed(0.05, lambda: scale))


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
    moments = torch.ops.rgd_ext.gram_moments((rounded @ rounded.T).float())

    def stats(dtype, device):
        return Stats(2, *moments, rounding(dtype, torch.device(device)))

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


batches = st.integers(2, 6).flatmap(
    lambda b: st.lists(st.lists(st.integers(-4, 4), min_size=3, max_size=3), min_size=b, max_size=b)
)


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


@settings(deadline=None, max_examples=60)
@given(batches, st.sampled_from(POLICIES), st.sampled_from(INVERSES))
def test_weights_sum_to_one(rows, policy, inverse):
    _, stats = rgd_ext.direction(torch.tensor(rows, dtype=torch.float64), epsilon=policy, inverse=inverse)
    assert torch.allclose(stats.weights.sum(), torch.ones((), dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_order_of_samples_does_not_matter(policy, inverse):
    grads, order = sample(), torch.randperm(6)
    result, _ = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    permuted, _ = rgd_ext.direction([g[order] for g in grads], epsilon=policy, inverse=inverse)
    assert_close(flat(permuted), flat(result))


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_sample_twice_changes_nothing(policy, inverse):
    grads = sample()
    result, _ = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    doubled, _ = rgd_ext.direction([torch.cat([g, g]) for g in grads], epsilon=policy, inverse=inverse)
    assert_close(flat(doubled), flat(result))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
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


def test_rayleigh_fraction_is_the_lost_descent():
    rows = rows_of(sample())
    for fraction in (-1.0, 0.3, 0.9, 1.0):
        (step,), _ = rgd_ext.direction(rows, epsilon=Rayleigh(fraction))
        mean = rows.mean(0)
        assert torch.allclose(step @ mean, (1 - fraction) * mean @ mean)


def test_trace_stays_within_equation_6():
    for _ in range(20):
        rows = torch.randn(5, 3, dtype=torch.float64)
        _, stats = rgd_ext.direction(rows, epsilon=Trace(0.999))
        assert stats.epsilon < 1 / torch.linalg.eigvalsh(diffusion_matrix(rows))[-1]


def test_exact_inverse_allows_what_the_weak_field_does_not():
    rows = rows_of(sample())
    (step,), _ = rgd_ext.direction(rows, epsilon=Spectral(5.0), inverse="exact")
    assert_close(step, direction(rows, "Spectral", 5.0, "exact"))


@pytest.mark.parametrize("epsilon", [lambda s: 0.1, lambda s: torch.tensor(0.1), lambda s: 0.1 * s.trace / s.trace])
def test_a_callable_is_a_policy(epsilon):
    rows = rows_of(sample())
    (step,), _ = rgd_ext.direction(rows, epsilon=epsilon)
    assert_close(step, direction(rows, "Fixed", 0.1), torch.float32)


def test_any_source_that_follows_the_protocol_will_do():
    class Source:
        def __init__(self, rows):
            self.rows, self.batch_size = rows, len(rows)

        def mean(self):
            return [self.rows.mean(0)]

        def align(self, vector):
            return self.rows @ vector[0]

        def gram(self):
            return self.rows @ self.rows.T

        def combine(self, weights):
            return [weights @ self.rows]

    rows = rows_of(sample())
    assert isinstance(Source(rows), rgd_ext.PerSampleGradients)
    for policy in POLICIES:
        (step,), _ = rgd_ext.direction(Source(rows), epsilon=policy)
        assert_close(step, flat(rgd_ext.direction(rows, epsilon=policy)[0]))


def test_dense_source_is_the_matrix():
    grads = sample()
    source, rows = DenseGradients(grads), rows_of(grads)
    vector = [torch.randn(g.shape[1:], dtype=g.dtype) for g in grads]
    assert_close(flat(source.mean()), rows.mean(0))
    assert_close(source.align(vector), rows @ flat(vector))
    assert_close(source.gram(), rows @ rows.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_gradients_that_are_not_finite_flow_through(policy, inverse, value):
    grads = sample(torch.float32)
    grads[0][2, 1] = value
    result, _ = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    assert not flat(result).isfinite().all()


BAD = {
    "fixed nan": (lambda: Fixed(float("nan")), ValueError, "nan"),
    "spectral inf": (lambda: Spectral(float("inf")), ValueError, "inf"),
    "trace nan": (lambda: Trace(float("nan")), ValueError, "nan"),
    "rayleigh inf": (lambda: Rayleigh(float("-inf")), ValueError, "-inf"),
    "spectral 1": (lambda: rgd_ext.direction(torch.ones(3, 2), epsilon=Spectral(1.0)), ValueError, "fraction=1.0"),
    "trace -1": (lambda: rgd_ext.direction(torch.ones(3, 2), epsilon=Trace(-1.0)), ValueError, "fraction=-1.0"),
    "singular": (
        lambda: rgd_ext.direction(torch.ones(3, 2), epsilon=Spectral(-1.5), inverse="exact"),
        ValueError,
        "singular",
    ),
    "every 0": (lambda: Spectral(0.5, every=0), ValueError, "every=0"),
    "every half": (lambda: Spectral(0.5, every=1.5), TypeError, "every=1.5"),
    "every 2 exact": (
        lambda: rgd_ext.direction(torch.ones(3, 2), epsilon=Spectral(0.5, every=2), inverse="exact"),
        ValueError,
        "every=2.*weak-field",
    ),
    "inverse": (lambda: rgd_ext.direction(torch.ones(3, 2), inverse="weak"), ValueError, "'weak'"),
    "policy": (lambda: rgd_ext.direction(torch.ones(3, 2), epsilon=None), TypeError, "None"),
    "policy nan": (lambda: rgd_ext.direction(torch.randn(3, 2), epsilon=lambda s: float("nan")), ValueError, "nan"),
    "policy str": (lambda: rgd_ext.direction(torch.randn(3, 2), epsilon=lambda s: "1"), TypeError, "'1'"),
    "policy of two": (
        lambda: rgd_ext.direction(torch.randn(3, 2), epsilon=lambda s: torch.ones(2)),
        ValueError,
        r"shape \(2,\)",
    ),
    "names": (lambda: rgd_ext.direction({"w": torch.ones(3, 2)}), TypeError, "str"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()
