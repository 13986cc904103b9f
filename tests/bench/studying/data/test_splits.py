"""Training, validation and test samples of a data set."""

import hashlib

import numpy as np
import pytest
import torch
from data_files import (
    GOOD,
    like_mnist,
    write,
)

from bench.studying.data import Sources
from bench.studying.data.sources import stratified_order


def rows(samples):
    images = samples.inputs.flatten(1).tolist()
    return {(*image, label) for image, label in zip(images, samples.labels.tolist(), strict=True)}


@pytest.fixture
def sources(tmp_path):
    return Sources([write(tmp_path, GOOD)], [like_mnist(GOOD)])


@pytest.mark.parametrize(
    ("name", "validation", "test", "most"), [("digits", 300, 497, 1000), ("like MNIST", 2000, 20, 1350)]
)
def test_a_split_has_disjoint_sets_of_the_promised_sizes(sources, name, validation, test, most):
    split = sources.split(name, most)
    parts = (split.train, split.validation, split.test)
    assert [len(part) for part in parts] == [most, validation, test]
    distinct = [rows(part) for part in parts]
    # The images of both data sets are distinct, so that a sample in two parts would be missed in the union.
    assert len(set.union(*distinct)) == most + validation + test
    assert distinct[0] | distinct[1] <= rows(sources.load(name)[0])
    for part in parts:
        assert part.inputs.min() >= -1
        assert part.inputs.max() <= 1


@pytest.mark.parametrize("name", ["digits", "like MNIST"])
def test_every_part_has_the_shares_of_the_classes(sources, name):
    for samples in (10, 137, 1000):
        split, everything = sources.split(name, samples), sources.load(name)[0]
        shares = everything.labels.bincount() / len(everything)
        for part in (split.train, split.validation):
            assert (part.labels.bincount(minlength=10) - shares * len(part)).abs().max() < 2


def test_a_larger_training_set_contains_the_smaller_one_and_the_rest_is_the_same(sources):
    small, large = sources.split("digits", 100), sources.split("digits", 900)
    assert torch.equal(large.train.inputs[:100], small.train.inputs)
    assert torch.equal(large.train.labels[:100], small.train.labels)
    for part in ("validation", "test"):
        assert torch.equal(getattr(small, part).inputs, getattr(large, part).inputs)


def test_the_split_of_digits_stays_the_same():
    # Results that are kept belong to this split. All values are exact in float32, so that the bytes are the same.
    split = Sources().split("digits", 1000)
    content = b"".join(part.inputs.numpy().tobytes() for part in (split.train, split.validation, split.test))
    assert hashlib.md5(content).hexdigest() == "57068f4b984c8e474e9397ac24f13e7e"


@pytest.mark.parametrize("samples", [0, 1001])
def test_more_samples_than_there_are_is_an_error(samples):
    with pytest.raises(ValueError, match=f"digits has 1 to 1000 training samples .* not {samples}"):
        Sources().split("digits", samples)


def test_a_data_set_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no data set 'mnist' is there, only digits"):
        Sources().split("mnist", 10)


def test_a_stratified_order_is_a_random_permutation():
    labels = np.repeat(np.arange(3), (5, 50, 500))
    order = stratified_order(labels)
    assert sorted(order) == list(range(555))
    within = order[labels[order] == 2]
    assert abs(np.corrcoef(within, np.arange(500))[0, 1]) < 0.15
