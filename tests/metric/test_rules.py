"""Rules: what they are called with, what becomes of the weights they return, and which of those are refused."""

import pytest
import torch
from metric_cases import rows_of, sample
from oracle import assert_close, diffusion_matrix, direction, flat

import rgd_ext
from rgd_ext import Rayleigh, Spectral
from rgd_ext.metric import NEEDS, Policy


class Rule:
    """A rule that returns what it is made with, and keeps what it sees."""

    def __init__(self, weights, needs="gram"):
        self.weights, self.needs, self.seen = weights, needs, []

    def __call__(self, stats):
        self.seen.append(stats)
        return self.weights

    def __repr__(self):
        return "my rule"


WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.25, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("needs", NEEDS)
def test_direction_is_the_weighted_sum_of_the_gradients(needs):
    grads = sample()
    result, stats = rgd_ext.direction(grads, weights=Rule(WEIGHTS, needs))
    rows = rows_of(grads)
    assert_close(flat(result), WEIGHTS @ rows)
    assert torch.equal(stats.weights, WEIGHTS)
    assert stats.epsilon is None
    assert "epsilon" not in repr(stats)


@pytest.mark.parametrize("needs", NEEDS)
def test_statistics_of_a_direction_hold_for_weights_of_any_sum(needs):
    grads = sample()
    result, stats = rgd_ext.direction(grads, weights=Rule(WEIGHTS, needs))
    step, mean = flat(result), rows_of(grads).mean(0)
    assert_close(stats.direction_norm, step.norm())
    assert_close(stats.cosine, step @ mean / (step.norm() * mean.norm()))
    assert stats.negative_weights == 1
    assert_close(stats.effective_sample_size, WEIGHTS.sum() ** 2 / WEIGHTS.square().sum())


@pytest.mark.parametrize("needs", NEEDS)
def test_the_norm_of_a_direction_in_which_gradients_cancel_keeps_its_digits(needs):
    rows = torch.tensor([[1, 1e-4], [-3, 1e-4]])
    (step,), stats = rgd_ext.direction(rows, weights=Rule(torch.tensor([0.75, 0.25]), needs))
    assert_close(stats.direction_norm, step.double().norm(), torch.float32)
    assert stats.cosine.abs() < 1e-2


def test_statistics_keep_their_own_weights():
    weights = WEIGHTS.clone()
    _, stats = rgd_ext.direction(sample(), weights=Rule(weights))
    weights.zero_()
    assert torch.equal(stats.weights, WEIGHTS)


def test_weights_that_are_not_finite_can_be_replaced():
    rows = rows_of(sample())
    weights = WEIGHTS.clone()
    weights[1] = float("inf")
    (step,), _ = rgd_ext.direction(rows, weights=lambda stats: torch.where(weights.isfinite(), weights, 0))
    weights[1] = 0
    assert_close(step, weights @ rows)


def test_weights_that_are_all_zero_have_no_effective_samples():
    result, stats = rgd_ext.direction(sample(), weights=Rule(0 * WEIGHTS))
    assert not flat(result).any()
    assert stats.effective_sample_size == 0


def test_a_rule_has_the_gramian_unless_it_says_that_it_needs_none():
    rows = rows_of(sample())
    rules = [Rule(WEIGHTS, needs) for needs in NEEDS]
    for rule in rules:
        rgd_ext.direction(rows, weights=rule)
    grams = {rule.needs: rule.seen[0].gram for rule in rules}
    assert_close(grams.pop("gram"), rows @ rows.T)
    assert set(grams.values()) == {None}


READERS = {"weights": lambda stats: stats.gram.sum(1), "epsilon": lambda stats: 0.5 / stats.largest_eigenvalue}


@pytest.mark.parametrize("argument", READERS)
def test_a_function_that_reads_the_gramian_without_needing_it_is_told_so(argument):
    def function(stats):
        return READERS[argument](stats)

    function.needs = "norms"
    with pytest.raises(RuntimeError, match=r"function.* failed: .*NoneType.* set its attribute `needs` to 'gram'"):
        rgd_ext.direction(rows_of(sample()), **{argument: function})
    function.needs = "gram"
    rgd_ext.direction(rows_of(sample()), **{argument: function})


def test_a_policy_that_reads_the_gramian_without_needing_it_is_told_so():
    class Half(Policy):
        needs = "alignments"

        def __call__(self, stats):
            return 0.5 / stats.largest_eigenvalue

    with pytest.raises(RuntimeError, match=r"Half.* failed: .*NoneType.* set its attribute `needs`"):
        rgd_ext.direction(rows_of(sample()), epsilon=Half())


def test_the_gramian_of_one_rule_in_turns():
    class Alternating(Rule):
        @property
        def needs(self):
            return "norms" if len(self.seen) % 2 else "gram"

        @needs.setter
        def needs(self, value):
            pass

    rule = Alternating(WEIGHTS)
    model, x = torch.nn.Conv1d(2, 3, 2, dtype=torch.float64), torch.randn(6, 2, 5, dtype=torch.float64)
    with rgd_ext.precondition(model, weights=rule) as handle:
        handle.plan(x)
        for _ in range(4):
            model(x).square().mean().backward()
    assert [stats.gram is None for stats in rule.seen] == [False, True, False, True]


def test_relativistic_weights_from_a_rule_give_the_direction_of_the_policy():
    rows = rows_of(sample())

    def rule(stats):
        return (1 - 0.5 / stats.largest_eigenvalue * stats.alignments) / stats.batch_size

    (step,), _ = rgd_ext.direction(rows, weights=rule)
    assert_close(step, direction(rows, "Spectral", 0.5))


def test_a_rule_runs_without_autograd_and_its_weights_may_have_any_real_dtype():
    rows, parameter = rows_of(sample()), torch.nn.Parameter(torch.ones(6, dtype=torch.float32))
    modes = []

    def rule(stats):
        modes.append(torch.is_grad_enabled())
        return parameter

    (step,), stats = rgd_ext.direction(rows, weights=rule)
    assert modes == [False]
    assert not step.requires_grad
    assert not stats.weights.requires_grad
    assert_close(step, rows.sum(0))
    (step,), _ = rgd_ext.direction(rows, weights=lambda stats: torch.arange(6))
    assert_close(step, torch.arange(6.0, dtype=torch.float64) @ rows)


def test_inner_products_with_a_vector_are_there_while_a_rule_chooses():
    grads, seen = sample(), []
    vectors = [torch.randn(g.shape[1:], dtype=torch.float64) for g in grads]
    expected = rows_of(grads) @ flat(vectors)

    def rule(stats):
        seen.append(stats)
        return stats.align(vectors)

    result, stats = rgd_ext.direction(grads, weights=rule)
    assert_close(stats.weights, expected)
    assert_close(flat(result), expected @ rows_of(grads))
    for later in (stats, *seen):
        with pytest.raises(RuntimeError, match=r"not there: call stats.align\(vectors\) while a weights= rule"):
            later.align(vectors)
    # A policy has them, too; a single tensor of gradients takes a single one.
    rows = rows_of(grads)
    _, stats = rgd_ext.direction(rows, epsilon=lambda stats: stats.align(rows[0])[0])
    assert_close(stats.epsilon, rows[0] @ rows[0])


def fails(weights, **others):
    return lambda: rgd_ext.direction(torch.randn(6, 3), weights=weights, **others)


def aligning(*vectors):
    return fails(lambda stats: stats.align(list(vectors)))


BAD = {
    "a number": (fails(0.5), TypeError, "weights is 0.5: pass a callable Statistics"),
    "a class": (fails(rgd_ext.weights.Normalise), TypeError, "weights is <class .*Clip"),
    "a tensor": (fails(torch.ones(6)), TypeError, "weights is tensor"),
    "with epsilon": (
        fails(Rule(WEIGHTS), epsilon=Spectral(0.5)),
        TypeError,
        r"weights=my rule and epsilon=Spectral\(.*\): pass one or the other",
    ),
    "with epsilon 0": (fails(Rule(WEIGHTS), epsilon=0.0), TypeError, "my rule and epsilon=0.0"),
    "with inverse": (fails(Rule(WEIGHTS), inverse="exact"), TypeError, "my rule and inverse='exact'"),
    "needs": (fails(Rule(WEIGHTS, "eigenvalues")), ValueError, "my rule has needs = 'eigenvalues': choose .*'gram'"),
    "returns a list": (fails(Rule([1.0] * 6)), TypeError, r"my rule returned a list: return a tensor of shape \(6,\)"),
    "returns nothing": (fails(Rule(None)), TypeError, "my rule returned a NoneType"),
    "returns five": (fails(Rule(WEIGHTS[:5])), ValueError, r"of shape \(5,\) for 6 samples: .* of shape \(6,\)"),
    "returns a column": (fails(Rule(WEIGHTS[:, None])), ValueError, r"of shape \(6, 1\) for 6 samples"),
    "returns a scalar": (fails(Rule(torch.tensor(1.0))), ValueError, r"of shape \(\) for 6 samples"),
    "returns nan": (
        fails(Rule(WEIGHTS / 0)),
        ValueError,
        r"my rule returned the weight inf: .*; torch.where\(weights.isfinite\(\), weights, 0\) replaces",
    ),
    "returns sparse": (fails(Rule(WEIGHTS.to_sparse())), TypeError, "not dense.*: return an ordinary tensor on cpu"),
    "returns meta": (fails(Rule(WEIGHTS.to("meta"))), TypeError, "without numbers: return an ordinary tensor on cpu"),
    "returns complex": (fails(Rule(WEIGHTS + 0j)), TypeError, "complex128: return real numbers"),
    "aligns with none": (aligning(), ValueError, "vectors has 0 tensors and grads 1: pass one for each"),
    "aligns by name": (fails(lambda stats: stats.align({"w": torch.ones(3)})), TypeError, "have no names"),
    "aligns with a list": (aligning([1.0] * 3), TypeError, r"vectors\[0\] is a list: pass a tensor of shape \(3,\)"),
    "aligns with four": (aligning(torch.ones(4)), ValueError, r"vectors\[0\] has shape \(4,\): .* shape \(3,\)"),
    "aligns in float64": (
        aligning(WEIGHTS[:3]),
        TypeError,
        r"dtype torch.float64: convert it with .to\(torch.float32\)",
    ),
    "aligns elsewhere": (aligning(torch.ones(3, device="meta")), ValueError, r"is on meta: move it with .to\('cpu'\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rules_and_vectors_are_refused(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_overflow_are_passed_on(value):
    rows = torch.randn(6, 3)
    rows[2] = value
    rule = Rule(WEIGHTS)
    (step,), _ = rgd_ext.direction(rows, weights=rule)
    assert not step.isfinite().any()
    assert not rule.seen


def test_a_policy_is_refused_as_a_rule():
    rows = rows_of(sample())
    with pytest.raises(TypeError, match=r"weights is the policy Rayleigh\(fraction=0.5\): pass it as epsilon"):
        rgd_ext.direction(rows, weights=Rayleigh(0.5))


def test_the_noise_scale_is_that_of_the_unbiased_estimates():
    rows = rows_of(sample())
    _, stats = rgd_ext.direction(rows)
    trace = diffusion_matrix(rows).trace() * 6 / 5
    assert_close(stats.unbiased_trace, trace)
    assert_close(stats.unbiased_squared_grad_norm, rows.mean(0).square().sum() - trace / 6)
    assert_close(stats.noise_scale, trace / (rows.mean(0).square().sum() - trace / 6))
