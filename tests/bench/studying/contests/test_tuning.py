"""The choice of learning rates."""

import math
import re

import pytest

from bench.studying.contests.tuning import LIMIT, grid, maxima, refine, search, usual_rates
from bench.studying.question import Finished, Line

LARGEST = re.escape(f"{2.0**22:g}")


def tuned(optimum, seeds=(100, 101), rates=(0.5, 1.0, 2.0), diverges_from=math.inf):
    """Search with a score whose best rate is known; the best rate found, and how many runs it took."""
    finished, asked = Finished(), 0

    def score(outcome):
        return (outcome["score"],)

    while True:
        runs, best = search(finished, {"method": "SGD"}, rates, seeds, score)
        missing = [run for run in runs if run not in finished]
        if best is not None:
            assert not missing
            return best, asked
        assert missing
        for run in missing:
            asked += 1
            value = -math.inf if run["lr"] >= diverges_from else -((math.log2(run["lr"] / optimum)) ** 2)
            # Each seed prefers another rate; only their mean has the optimum.
            shift = 0.0 if math.isinf(value) else math.log2(run["lr"]) * (run["seed"] - 100.5)
            finished.add(Line(run, {"score": value + shift}, 0.0, {}))


def test_grid_is_geometric():
    assert grid(0.1, 3) == [0.05, 0.1, 0.2]


def test_grids_for_pairwise_wrong_labels_begin_lower_and_end_alike():
    for method, momentum in (("SGD", 0.0), ("SGD", 0.9), ("AdamW", 0.9)):
        clean, pairwise = (
            usual_rates({"method": method, "momentum": momentum, "labels": labels})
            for labels in ("clean", "pairwise 0.4")
        )
        assert clean == usual_rates({"method": method, "momentum": momentum, "labels": "symmetric 0.4"})
        assert len(clean) == 7
        assert pairwise[3:] == clean
        assert pairwise[0] == clean[0] / 8


def test_best_rate_inside_of_the_grid():
    assert tuned(1.0) == (1.0, 6)


@pytest.mark.parametrize(("optimum", "runs"), [(4.0, 10), (16.0, 14), (0.25, 10), (0.5, 8), (2.0, 8)])
def test_edge_is_never_chosen(optimum, runs):
    assert tuned(optimum) == (optimum, runs)


def test_grid_is_widened_towards_a_second_maximum_among_small_rates():
    scores = {1: 5, 2: 4, 4: 6, 8: 3, 0.5: 7, 0.25: 7, 0.125: 2}
    finished = Finished()

    def asked():
        return search(finished, {}, [1.0, 2.0, 4.0, 8.0], (0,), lambda outcome: (outcome["score"],))

    while missing := [run for run in asked()[0] if run not in finished]:
        for run in missing:
            finished.add(Line(run, {"score": scores[run["lr"]]}, 0.0, {}))
    assert asked()[1] == 0.25
    assert len(finished) == len(scores)


def test_rates_that_diverge_are_not_chosen():
    assert tuned(1.0, diverges_from=0.5) == (0.25, 10)


def test_next_score_decides_between_equal_ones():
    finished = Finished()
    runs, _ = search(finished, {}, [1.0, 2.0, 4.0, 8.0], (0,), lambda outcome: outcome["scores"])
    for run in runs:
        finished.add(Line(run, {"scores": (1 if run["lr"] in (2, 4) else 0, run["lr"])}, 0.0, {}))
    assert search(finished, {}, [1.0, 2.0, 4.0, 8.0], (0,), lambda outcome: outcome["scores"])[1] == 4


@pytest.mark.parametrize(
    ("scores", "best"), [((1, 2, 0), 2**-0.5), ((1, 0, 2), 2**0.5), ((1, 1, 0), 1), ((2, 1, 1), 1)]
)
def test_rate_is_refined_by_half_a_factor(scores, best):
    finished = Finished()
    runs, found = refine(finished, {}, [1.0], (0, 1), lambda outcome: (outcome["score"],))
    assert found is None
    assert [run["lr"] for run in runs[::2]] == pytest.approx([1, 2**-0.5, 2**0.5])
    for number, run in enumerate(runs):
        # For each seed alone, another rate is the best one.
        finished.add(Line(run, {"score": scores[number // 2] + 9 * (-1) ** number * (number // 2)}, 0.0, {}))
    assert refine(finished, {}, [1.0], (0, 1), lambda outcome: (outcome["score"],))[1] == pytest.approx(best)


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ((1, 2, 3, 2, 1), [3]),
        ((1, 3, 2, 4, 1), [4, 2]),
        ((4, 6, 3, 5, 2, 4, 3), [2, 4]),
        ((5, 2, 3, 1), [1, 3]),
        ((1, 2, 2, 1), [2]),
    ],
    ids=str,
)
def test_maxima_are_the_best_rate_and_the_best_other_one_between_worse_neighbours(scores, found):
    finished = Finished()
    for lr, score in enumerate(scores, 1):
        # For each seed alone, another rate is the best one.
        for seed in (0, 1):
            finished.add(Line({"lr": lr, "seed": seed}, {"score": score + 9 * lr * (-1) ** seed}, 0.0, {}))
    rates = range(1, len(scores) + 1)
    assert maxima(finished, {}, rates, (0, 1), lambda outcome: (outcome["score"],)) == found


def test_search_without_an_end_fails():
    edge = f"the best of {LIMIT} rates from 0.5 to {LARGEST}, or of the smallest two, is at the edge"
    with pytest.raises(RuntimeError, match=rf"{edge}, for \{{'method': 'SGD'\}}"):
        tuned(2.0**40)
