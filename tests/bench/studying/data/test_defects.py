"""What is wrong with the training sets of the study, by definition, and with the sets that methods are evaluated on."""

import numpy as np
import pytest
import torch

from bench.studying.data import Samples
from bench.studying.data.corruption import correlated, imbalanced, pairwise, symmetric
from bench.studying.data.defects import DEFECTS, defect, described

LABEL_ROW = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 1000))


@pytest.mark.parametrize("corrupt", [symmetric, pairwise])
@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.2, 200), (0.3336, 334), (1, 1000)])
def test_exactly_the_share_of_the_labels_is_wrong(corrupt, share, count):
    before = LABEL_ROW.clone()
    labels, wrong = corrupt(LABEL_ROW, share, 10, seed=3)
    assert torch.equal(LABEL_ROW, before)
    assert torch.equal(labels != LABEL_ROW, wrong)
    assert wrong.sum() == count
    assert labels.dtype == torch.int64
    assert 0 <= labels.min() <= labels.max() <= 9


def test_symmetric_corruption_gives_all_other_classes_equally_often():
    labels, _ = symmetric(torch.full((9000,), 4), 1.0, 10, seed=0)
    counts = labels.bincount(minlength=10)
    assert counts[4] == 0
    # Five standard deviations of a binomial distribution of 9,000 samples with the mean 1,000.
    assert (counts[torch.arange(10) != 4] - 1000).abs().max() < 5 * (1000 * 8 / 9) ** 0.5


def test_pairwise_corruption_gives_the_next_class_and_0_after_the_last():
    labels, wrong = pairwise(LABEL_ROW, 0.4, 10, seed=0)
    following = {**{c: c + 1 for c in range(9)}, 9: 0}
    assert labels[wrong].tolist() == [following[c] for c in LABEL_ROW[wrong].tolist()]


@pytest.mark.parametrize("corrupt", [symmetric, pairwise])
def test_corruption_is_a_function_of_the_seed(corrupt):
    first, again, other = (corrupt(LABEL_ROW, 0.4, 10, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_wrong_labels_are_not_the_first_in_an_order_of_the_same_seed():
    # Otherwise, training would begin with batches of wrong labels only.
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(5))
    _, wrong = symmetric(LABEL_ROW, 0.2, 10, seed=5)
    assert 10 < wrong[order[:200]].sum() < 80


def test_a_larger_share_keeps_the_wrong_labels_of_a_smaller_one():
    few, many = (symmetric(LABEL_ROW, share, 10, seed=2) for share in (0.1, 0.5))
    assert torch.equal(many[0][few[1]], few[0][few[1]])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((LABEL_ROW, -0.1, 10), "share must be from 0 to 1, not -0.1"),
        ((LABEL_ROW, 0.1, 1), "classes must be at least 2, not 1"),
        ((LABEL_ROW, 0.1, 9), "labels must be from 0 to 8, not 0 to 9"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        symmetric(*arguments, seed=0)
    with pytest.raises(ValueError, match=problem):
        pairwise(*arguments, seed=0)


@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_class_sizes_fall_geometrically(ratio):
    labels = torch.arange(10).repeat(200)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    kept = imbalanced(labels, ratio, 10, seed=0)
    assert torch.equal(kept, kept.unique())
    sizes = labels[kept].bincount(minlength=10).double()
    expected = 200 * np.geomspace(1, 1 / ratio, 10)
    assert np.abs(sizes.numpy() - expected).max() <= 0.5
    assert not torch.equal(kept, imbalanced(labels, ratio, 10, seed=1)) or ratio == 1
    assert torch.equal(kept, imbalanced(labels, ratio, 10, seed=0))


def test_class_sizes_fall_geometrically_when_the_classes_are_unequal():
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 100)
    sizes = labels[imbalanced(labels, 4, 3, seed=0)].bincount()
    assert sizes.tolist() == [40, 20, 10]


def test_imbalance_that_would_leave_a_class_empty_is_an_error():
    with pytest.raises(ValueError, match="1000 labels are too few for the ratio 1000"):
        imbalanced(LABEL_ROW, 1000, 10, 0)
    with pytest.raises(ValueError, match=r"at least 1, not 0\.5"):
        imbalanced(LABEL_ROW, 0.5, 10, 0)


@pytest.mark.parametrize("share", [0, 0.05, 0.9, 1])
def test_attribute_goes_with_the_upper_half_of_the_classes(share):
    before = LABEL_ROW.clone()
    marked = correlated(LABEL_ROW, share, 10, seed=4)
    assert torch.equal(LABEL_ROW, before)
    for label in range(10):
        members = LABEL_ROW.eq(label)
        assert abs(marked[members].sum() - members.sum() * (share if label >= 5 else 1 - share)) <= 0.5
    assert torch.equal(marked, correlated(LABEL_ROW, share, 10, seed=4))
    assert share in (0, 1) or not torch.equal(marked, correlated(LABEL_ROW, share, 10, seed=5))


def test_attribute_of_a_share_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"share must be from 0 to 1, not 1\.5"):
        correlated(LABEL_ROW, 1.5, 10, seed=0)


# Defects.

IMAGES = torch.rand(1000, 1, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.1
SAMPLES = Samples(IMAGES, LABEL_ROW)


def same(samples, others):
    return samples.inputs.equal(others.inputs) and samples.labels.equal(others.labels)


@pytest.mark.parametrize(("name", "corrupt"), [("symmetric", symmetric), ("pairwise", pairwise)])
def test_wrong_labels_are_those_of_the_training_set_only(name, corrupt):
    found, share = defect(f"{name} 0.2")
    assert same(found.train(SAMPLES, share, 7), Samples(IMAGES, corrupt(LABEL_ROW, 0.2, 10, 7)[0]))
    assert found.evaluation(SAMPLES) is SAMPLES


def test_unequal_classes_are_those_of_the_training_set_only():
    found, ratio = defect("imbalanced 50")
    assert same(found.train(SAMPLES, ratio, 7), SAMPLES[imbalanced(LABEL_ROW, 50, 10, 7)])
    assert found.evaluation(SAMPLES) is SAMPLES


def test_contrast_of_training_samples_goes_with_the_half_of_the_classes():
    found, share = defect("contrast 0.9")
    train = found.train(SAMPLES, share, 7)
    inverted = (train.inputs < 0).flatten(1)
    assert inverted.any(1).equal(inverted.all(1))
    assert inverted[:, 0].equal(correlated(LABEL_ROW, 0.9, 10, 7))
    assert train.inputs.abs().equal(IMAGES)
    assert train.labels.equal(LABEL_ROW)


def test_samples_to_evaluate_have_both_contrasts_in_four_groups():
    samples = defect("contrast 0.9")[0].evaluation(SAMPLES)
    assert same(samples[torch.arange(0, 2000, 2)], SAMPLES)
    assert same(samples[torch.arange(1, 2000, 2)], Samples(-IMAGES, LABEL_ROW))
    assert samples[torch.arange(1, 2000, 2)].groups.equal(samples.groups[1::2])
    upper, inverted = samples.labels >= 5, samples.inputs[:, 0, 0, 0] < 0
    places = {(bool(u), bool(i)): int(g) for u, i, g in zip(upper, inverted, samples.groups, strict=True)}
    assert sorted(places.values()) == [0, 1, 2, 3]
    assert all(places[bool(u), bool(i)] == g for u, i, g in zip(upper, inverted, samples.groups, strict=True))


def test_clean_samples_are_left_as_they_are():
    found, number = defect("clean")
    assert found.train(SAMPLES, number, 0) is SAMPLES
    assert found.evaluation(SAMPLES) is SAMPLES


@pytest.mark.parametrize("text", ["", "symmetric", "symmetric x", "other 0.2", "clean 0"])
def test_other_defects_are_errors(text):
    with pytest.raises(ValueError, match=f'"symmetric NUMBER".*not {text!r}'):
        defect(text)


@pytest.mark.parametrize("text", ["symmetric 1.5", "pairwise nan", "contrast -1", "imbalanced 0.5"])
def test_numbers_that_a_defect_does_not_have_are_errors(text):
    found, number = defect(text)
    with pytest.raises(ValueError, match="must be"):
        found.train(SAMPLES, number, 0)


def test_defects_are_described_in_words():
    assert described("clean") == "clean labels"
    assert described("symmetric 0.4") == "40 % wrong labels (symmetric)"
    assert described("imbalanced 50") == "unequal classes (50 to 1)"
    assert len({described(f"{name} 0.2") for name in DEFECTS}) == len(DEFECTS)
