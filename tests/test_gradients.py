"""Sources of per-sample gradients: those that inherit, and those that only have the methods."""

import pytest
import torch
from metric_cases import POLICIES, Methods, rows_of, sample
from oracle import assert_close, flat

import rgd_ext
from rgd_ext.gradients import DenseGradients, PerSampleGradients, adapted


class Inheriting(PerSampleGradients):
    """What the base class requires, and no more."""

    def __init__(self, rows):
        self.rows = rows

    @property
    def batch_size(self):
        return len(self.rows)

    mean, align, gram, combine = Methods.mean, Methods.align, Methods.gram, Methods.combine


class WithoutGramian(Inheriting):
    """Overrides the optional methods."""

    def gram(self):
        pytest.fail("the Gramian was computed")

    def moments(self):
        return DenseGradients(self.rows).moments()

    def combine_with_norm(self, weights):
        combination = self.combine(weights)
        return combination, combination[0].square().sum()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("source", [Methods, Inheriting])
def test_any_source_with_the_methods_will_do(source, policy):
    rows = rows_of(sample())
    assert isinstance(source(rows), rgd_ext.PerSampleGradients)
    (step,), stats = rgd_ext.direction(source(rows), epsilon=policy)
    expected, of_rows = rgd_ext.direction(rows, epsilon=policy)
    assert_close(step, flat(expected))
    assert_close(stats.direction_norm, of_rows.direction_norm)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p.needs != "gram"], ids=str)
def test_moments_of_a_source_take_the_place_of_the_gramian(policy):
    rows = rows_of(sample())
    (step,), stats = rgd_ext.direction(WithoutGramian(rows), epsilon=policy)
    assert_close(step, flat(rgd_ext.direction(rows, epsilon=policy)[0]))
    assert_close(stats.direction_norm, step.norm())


@pytest.mark.parametrize("source", [Methods, Inheriting, WithoutGramian])
def test_any_source_has_a_diffusion_matrix(source):
    rows = rows_of(sample())
    exact, matrix = rgd_ext.DiffusionMatrix(rows), rgd_ext.DiffusionMatrix(source(rows))
    assert_close(matrix.to_dense(), exact.to_dense())
    assert_close(matrix.trace(), exact.trace())


def test_only_classes_that_have_the_methods_are_adapted():
    rows = rows_of(sample())
    methods, inheriting = Methods(rows), Inheriting(rows)
    assert adapted(inheriting) is inheriting
    assert type(adapted(methods)) is not Methods
    assert adapted(methods).moments() is None
    assert not issubclass(Methods, DenseGradients)
    assert not isinstance(rows, PerSampleGradients)
    assert not isinstance([rows], PerSampleGradients)

    class Incomplete(PerSampleGradients):
        mean = align = gram = Methods.gram

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()


def test_dense_source_is_the_matrix():
    grads = sample()
    source, rows = DenseGradients(grads), rows_of(grads)
    vector = [torch.randn(g.shape[1:], dtype=g.dtype) for g in grads]
    assert_close(flat(source.mean()), rows.mean(0))
    assert_close(source.align(vector), rows @ flat(vector))
    assert_close(source.gram(), rows @ rows.T)


def test_moments_are_those_of_the_centred_gradients():
    grads = sample()
    rows = rows_of(grads)
    mean, moments = rows.mean(0), DenseGradients(grads).moments()
    assert_close(moments.squared_grad_norm, mean @ mean)
    assert_close(moments.alignments, (rows - mean) @ mean)
    assert_close(moments.squared_norms, (rows - mean).square().sum(1))
