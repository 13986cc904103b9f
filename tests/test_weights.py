"""The rules of `rgd_ext.weights`, against explicit gradients."""

import pytest
import torch
from metric_cases import rows_of, sample
from oracle import assert_close, flat

import rgd_ext
from rgd_ext.gradients import DenseGradients
from rgd_ext.metric import statistics
from rgd_ext.weights import Clip, FromGramian, Normalise


def clipped(rows, max_norm):
    norms = rows.norm(dim=1, keepdim=True)
    return (rows * (max_norm / norms).clamp(max=1)).mean(0)


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 100.0])
def test_clip_is_the_mean_of_clipped_gradients(max_norm):
    grads = sample()
    result, _ = rgd_ext.direction(grads, weights=Clip(max_norm))
    assert_close(flat(result), clipped(rows_of(grads), max_norm))


def test_clip_leaves_zeros_alone():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    (step,), stats = rgd_ext.direction(rows, weights=Clip(1.0))
    assert_close(step, torch.tensor([0.3, 0.4], dtype=torch.float64))
    assert stats.weights[0] == 0.5


def test_normalise_is_the_mean_of_gradients_of_norm_one():
    grads = sample()
    rows = rows_of(grads)
    result, _ = rgd_ext.direction(grads, weights=Normalise())
    assert_close(flat(result), (rows / rows.norm(dim=1, keepdim=True)).mean(0))
    rows[2] = 0
    (step,), stats = rgd_ext.direction(rows, weights=Normalise())
    assert stats.weights[2] == 0
    assert step.isfinite().all()


@pytest.mark.parametrize("rule", [Clip(1e-6), Normalise()], ids=repr)
def test_small_gradients_beside_large_ones_keep_their_norms(rule):
    rows = torch.nn.functional.normalize(torch.randn(8, 50)) * torch.logspace(-6, 2, 8)[:, None]
    _, stats = rgd_ext.direction(rows, weights=rule)
    assert_close(stats.sample_norms, rows.double().norm(dim=1), torch.float32)
    expected = (stats.sample_norms.min() / rows.double().norm(dim=1)).clamp(max=1)
    assert_close(stats.weights / stats.weights.max(), expected, torch.float32)


@pytest.mark.parametrize("scale", [64.0, lambda: 64.0], ids=["number", "function"])
@pytest.mark.parametrize("rule", [lambda scale: Clip(0.7, scale), Normalise], ids=["Clip", "Normalise"])
def test_rules_follow_the_scale_of_the_loss(rule, scale):
    rows = rows_of(sample())
    (expected,), _ = rgd_ext.direction(rows, weights=rule(1.0))
    (scaled,), _ = rgd_ext.direction(64 * rows, weights=rule(scale))
    assert_close(scaled, 64 * expected)


def test_clip_drops_no_sample_whose_norm_overflows():
    rows = torch.randn(4, 3)
    rows[0, 0] = 3e20  # finite, but its square is not
    weights = Clip(1.0)(statistics(DenseGradients(rows), with_gram=True))
    assert weights.isnan().tolist() == [True, False, False, False]
    (step,), _ = rgd_ext.direction(rows, weights=Clip(1.0))
    assert step.isnan().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_function_of_the_gramian_need_not_know_of_overflows(value):
    rows = torch.randn(6, 3)
    rows[1] = value
    rule = FromGramian(lambda gram: torch.linalg.eigvalsh(gram))
    assert rule(statistics(DenseGradients(rows), with_gram=True)).isnan().all()
    (step,), _ = rgd_ext.direction(rows, weights=rule)
    assert step.isnan().all()


def test_a_function_may_change_its_gramian():
    rows = rows_of(sample())
    _, stats = rgd_ext.direction(rows, weights=FromGramian(lambda gram: gram.fill_diagonal_(0).sum(1)))
    assert_close(stats.gram, rows @ rows.T)


def test_from_gramian_gives_the_function_the_gramian_and_takes_its_weights():
    rows, seen = rows_of(sample()), []

    def function(gram):
        seen.append(gram)
        return gram.mean(1)

    (step,), _ = rgd_ext.direction(rows, weights=FromGramian(function))
    assert_close(seen[0], rows @ rows.T)
    assert_close(step, (rows @ rows.mean(0)) @ rows)


BAD = {
    "clip 0": (lambda: Clip(0.0), ValueError, r"Clip\(max_norm=0.0\): pass a positive number"),
    "clip -1": (lambda: Clip(-1.0), ValueError, r"Clip\(max_norm=-1.0\)"),
    "clip nan": (lambda: Clip(float("nan")), ValueError, "nan.*finite"),
    "clip True": (lambda: Clip(True), TypeError, r"max_norm=True\): pass a number"),
    "clip None": (lambda: Clip(None), TypeError, r"max_norm=None\): pass a number"),
    "clip scale": (lambda: Clip(1.0, 0.0), ValueError, "loss_scale=0.0"),
    "normalise scale": (lambda: Normalise(-1.0), ValueError, r"Normalise\(loss_scale=-1.0\): pass a positive number"),
    "clip too large": (lambda: Clip(10**400), ValueError, "max_norm=...*a float can hold"),
    "clip tensor": (lambda: Clip(torch.ones(2)), TypeError, "pass a number"),
    "scale later": (
        lambda: rgd_ext.direction(torch.randn(3, 2), weights=Clip(1.0, lambda: 0.0)),
        ValueError,
        "loss_scale=0.0",
    ),
    "no function": (lambda: FromGramian(0.5), TypeError, r"FromGramian\(0.5\): pass a callable"),
    "a class": (lambda: FromGramian(Clip), TypeError, "UPGradWeighting()"),
}


def test_the_rules_say_that_they_need_the_gramian():
    assert {rule.needs for rule in (Clip(1.0), Normalise(), FromGramian(torch.diagonal))} == {"gram"}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()
