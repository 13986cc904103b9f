"""The statistics of the study."""

import itertools
import random
import statistics

import pytest

from bench.studying.inference import against, differences, holm, mean, p_value


def test_interval_covers_the_true_mean_as_often_as_it_says():
    generator = random.Random(0)
    samples = [[generator.gauss(3, 2) for _ in range(10)] for _ in range(200)]
    intervals = [mean(sample) for sample in samples]
    assert all(
        found.mean == pytest.approx(statistics.mean(sample)) for found, sample in zip(intervals, samples, strict=True)
    )
    # Of ten normal values the bootstrap's interval is known to be too narrow: about 0.9.
    assert 0.85 <= sum(found.low <= 3 <= found.high for found in intervals) / 200 <= 0.97


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0]])
def test_interval_of_values_that_agree_is_a_point(values):
    found = mean(values)
    assert (found.mean, found.low, found.high) == (2, 2, 2)


def test_interval_is_the_same_every_time():
    assert mean([1, 5, 2, 8]) == mean([1, 5, 2, 8])


def test_differences_are_of_the_same_seeds():
    assert differences([3, 5], [1, 1]) == [2, 4]
    with pytest.raises(ValueError, match="shorter"):
        differences([1, 2], [1])


@pytest.mark.parametrize("paired", [[0.3, -0.1, 0.2, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, -1.0]])
def test_p_value_counts_the_signs_that_give_as_large_a_mean(paired):
    sums = [
        sum(sign * value for sign, value in zip(signs, paired, strict=True))
        for signs in itertools.product([1, -1], repeat=len(paired))
    ]
    extreme = sum(abs(each) >= abs(sum(paired)) - 1e-12 for each in sums)
    assert p_value(paired) == pytest.approx(extreme / len(sums))


def test_one_seed_says_nothing():
    assert p_value([3.0]) == 1


@pytest.mark.parametrize(
    ("given", "corrected"),
    [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5, 0.6], [1, 1]), ([0.02], [0.02]), ([0.01, 0.01], [0.02, 0.02])],
)
def test_holm(given, corrected):
    assert holm(given) == pytest.approx(corrected)


def test_family_is_compared_with_the_baseline_and_corrected():
    baseline = [float(seed) for seed in range(10)]
    better = [value + 1 + 0.1 * seed for seed, value in enumerate(baseline)]
    mixed = [value + (-1) ** seed for seed, value in enumerate(baseline)]
    found = against(baseline, {"better": better, "mixed": mixed})
    assert found["better"].difference.mean == pytest.approx(1.45)
    assert found["better"].p == pytest.approx(2 * 2**-9)
    assert found["better"].significant
    assert found["mixed"].difference.low < 0 < found["mixed"].difference.high
    assert not found["mixed"].significant
