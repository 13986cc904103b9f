"""Policies: what their epsilons guarantee, and which arguments are refused."""

import pytest
import torch
from metric_cases import rows_of, sample
from oracle import assert_close, diffusion_matrix, direction, flat

import rgd_ext
from rgd_ext import Ascent, Fixed, Rayleigh, Spectral, Trace
from rgd_ext.commands import plan
from rgd_ext.metric import POLICIES, SCALE_FREE_POLICIES, Policy
from rgd_ext.metric.policies import checked_policy


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


def test_rayleigh_fraction_is_the_lost_descent():
    rows = rows_of(sample())
    for fraction in (-1.0, 0.3, 0.9, 1.0):
        (step,), _ = rgd_ext.direction(rows, epsilon=Rayleigh(fraction))
        mean = rows.mean(0)
        assert torch.allclose(step @ mean, (1 - fraction) * mean @ mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2, 3, 5, 6, 7])
def test_rayleigh_gives_the_plain_gradient_where_samples_are_orthogonal_and_of_equal_norm(size, dtype):
    # D g = 0, but the alignments <g_i - g, g> are zero up to rounding only.
    rows = torch.eye(size, dtype=dtype)
    (step,), stats = rgd_ext.direction(rows, epsilon=Rayleigh(0.5))
    assert stats.epsilon == 0
    assert_close(step, rows.mean(0))


def test_trace_stays_within_equation_6():
    for _ in range(20):
        rows = torch.randn(5, 3, dtype=torch.float64)
        _, stats = rgd_ext.direction(rows, epsilon=Trace(0.999))
        assert stats.epsilon < 1 / torch.linalg.eigvalsh(diffusion_matrix(rows))[-1]


@pytest.mark.parametrize("epsilon", [lambda s: 0.1, lambda s: torch.tensor(0.1), lambda s: 0.1 * s.trace / s.trace])
def test_a_callable_is_a_policy(epsilon):
    rows = rows_of(sample())
    (step,), _ = rgd_ext.direction(rows, epsilon=epsilon)
    assert_close(step, direction(rows, "Fixed", 0.1), torch.float32)


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
    "policy": (lambda: rgd_ext.direction(torch.ones(3, 2), epsilon="half"), TypeError, "'half'"),
    "needs": (lambda: rgd_ext.direction(torch.ones(3, 2), epsilon=Needing("all")), ValueError, "needs = 'all'.*'gram'"),
    "ascent -1": (lambda: Ascent(-1.0), ValueError, r"rho=-1.0.*at least 0"),
    "ascent nan": (lambda: Ascent(float("nan")), ValueError, "nan"),
    "ascent str": (lambda: Ascent("far"), TypeError, "'far'"),
    "ascent scale": (lambda: Ascent(0.1, 0.0), ValueError, "loss_scale=0.0"),
    "ascent exact": (
        lambda: rgd_ext.direction(torch.ones(3, 2), epsilon=Ascent(0.1), inverse="exact"),
        ValueError,
        "singular.*inverse='weak-field'",
    ),
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


class OfTheLargest(Policy):
    def __call__(self, stats):
        return 0.5 / stats.largest_eigenvalue


class OnlyExact(OfTheLargest):
    def check(self, inverse):
        if inverse != "exact":
            raise ValueError("only for the exact inverse")


class Needing:
    def __init__(self, needs, seen=None):
        self.needs, self.seen = needs, seen

    def __call__(self, stats):
        self.seen.append(stats)
        return 0.1

    def __repr__(self):
        return "my policy"


def test_a_policy_of_ones_own_has_the_gramian_and_may_refuse_an_inverse():
    rows = rows_of(sample())
    (step,), _ = rgd_ext.direction(rows, epsilon=OfTheLargest())
    assert_close(step, direction(rows, "Spectral", 0.5))
    with pytest.raises(ValueError, match="only for the exact inverse"):
        rgd_ext.direction(rows, epsilon=OnlyExact())
    (step,), _ = rgd_ext.direction(rows, epsilon=OnlyExact(), inverse="exact")
    assert_close(step, direction(rows, "Spectral", 0.5, "exact"))


def test_a_callable_has_the_gramian_unless_it_says_that_it_needs_none():
    rows, seen = rows_of(sample()), []
    rgd_ext.direction(rows, epsilon=lambda stats: seen.append(stats) or 0.1)
    rgd_ext.direction(rows, epsilon=Needing("norms", seen))
    assert [stats.largest_eigenvalue is None for stats in seen] == [False, True]


def test_a_policy_from_a_callable_shows_as_the_callable():
    policy = Needing("norms", [])
    assert repr(checked_policy(policy, "exact")) == "my policy"
    with pytest.raises(ValueError, match=r"the policy <function .*<lambda> at .*> returned epsilon = nan"):
        rgd_ext.direction(rows_of(sample()), epsilon=lambda stats: float("nan"))


def test_the_list_of_policies_has_all_that_the_package_offers():
    offered = {value for value in vars(rgd_ext).values() if isinstance(value, type) and issubclass(value, Policy)}
    assert offered == set(POLICIES)
    assert {type(policy()) for policy in SCALE_FREE_POLICIES} == offered - {Ascent, Fixed}
    assert set(plan.POLICIES.values()) == set(SCALE_FREE_POLICIES)


@pytest.mark.parametrize("policy", SCALE_FREE_POLICIES)
def test_scale_free_policies_give_directions_in_proportion_to_the_loss(policy):
    rows = rows_of(sample())
    (step,), _ = rgd_ext.direction(rows, epsilon=policy())
    (scaled,), _ = rgd_ext.direction(64 * rows, epsilon=policy())
    assert_close(scaled, 64 * step)
