"""Which runs of a contest are planned and count, and which entry is the baseline of the others."""

import random
from collections import Counter

import pytest
from contest_cases import BASE, ENTRIES, SGD, entry, finish, runs_at

from bench.studying.contests.contest import Contest, grouped
from bench.studying.contests.tuning import HALF, LIMIT
from bench.studying.question import Finished

CONTEST = Contest(lambda _: [1.0, 2.0, 4.0], lambda outcome: (outcome["score"],), {"evaluate": "validation"})


def finish_search(finished, best=2.0, **changes):
    while runs := [run for run in CONTEST.plan(finished, BASE | changes, ()) if run not in finished]:
        finish(finished, runs, lambda run: {"score": -abs(run["lr"] - best)})


def test_runs_that_count_follow_the_search_at_its_best_rate():
    finished = Finished()
    searching = CONTEST.plan(finished, BASE, range(3))
    assert {(run["lr"], run["seed"]) for run in searching} == {(lr, seed) for lr in (1, 2, 4) for seed in (100, 101)}
    assert {run["evaluate"] for run in searching} == {"validation"}
    finish_search(finished, best=2.7)
    planned = CONTEST.plan(finished, BASE, range(3))
    lr = 2 * HALF  # which is not on the first grid
    assert {run["lr"] for run in planned} == {1, 2, 4, 2 * HALF**-1, lr}
    counting = planned[-3:]
    assert counting == [BASE | {"lr": lr, "seed": seed} for seed in range(3)]
    assert CONTEST.entries(finished) == []
    finish(finished, counting, lambda run: {"score": run["seed"]})
    (entry,) = CONTEST.entries(finished)
    assert entry.config == BASE | {"lr": lr}
    assert entry.values("score") == [0, 1, 2]


def test_both_of_two_maxima_are_refined():
    finished = Finished()
    scores = {1.0: 0, 2.0: 7, 4.0: 1, 8.0: 6, 16.0: 0}
    contest = Contest(lambda _: list(scores), lambda outcome: (outcome["score"],))
    while missing := [run for run in contest.search(finished, BASE).runs if run not in finished]:
        finish(finished, missing, lambda run: {"score": scores.get(run["lr"], 9 if run["lr"] > 8 else 5)})
    assert contest.search(finished, BASE).best == 8 * HALF


CLIMBING = Contest(
    lambda _: [1.0, 2.0, 4.0], lambda outcome: (-outcome["loss"],), fails=lambda outcome: outcome["loss"] > 5
)


def climb(losses):
    """A search with these losses by rate, where with others one of the seeds fails; and how often each rate was run."""
    finished, counts = Finished(), Counter()
    while missing := [run for run in CLIMBING.search(finished, BASE).runs if run not in finished]:
        assert CLIMBING.search(finished, BASE).best is None
        counts.update(round(run["lr"], 3) for run in missing)
        finish(finished, missing, lambda run: {"loss": losses.get(round(run["lr"], 3), 9 * (run["seed"] == 101))})
    return CLIMBING.search(finished, BASE), counts


def test_search_goes_on_upwards_until_a_training_fails_and_takes_the_best_of_all():
    losses = {1.0: 3, 1.414: 3, 2.0: 2, 2.828: 4, 4.0: 3, 5.657: 1, 8.0: 4, 16.0: 0}
    search, counts = climb(losses)
    assert search.best == pytest.approx(4 * HALF)  # beyond a minimum at 2
    assert search.largest == pytest.approx(8)
    assert set(counts) == {1, 1.414, 2, 2.828, 4, 5.657, 8, 11.314}
    del losses[2.828]
    search, _ = climb(losses)
    assert (search.best, search.largest) == (2, 2)


def test_where_no_rate_trains_there_is_no_largest_one():
    search, counts = climb({1.0: 9, 1.414: 9, 2.0: 6, 2.828: 9, 4.0: 9})
    assert (search.best, search.largest) == (2, None)
    assert set(counts) == {1, 1.414, 2, 2.828, 4}


def test_climb_without_an_end_fails():
    rates = range(-60, 61)
    with pytest.raises(RuntimeError, match=rf"all of {LIMIT} rates from 2 to 5792.62 train, for \{{'data'"):
        climb({round(2 * HALF**power, 3): abs(power) / 100 for power in rates})


def test_rate_that_was_tried_is_not_tried_again_because_of_rounding():
    _, counts = climb({1.0: 3, 1.414: 2, 2.0: 1, 2.828: 0, 4.0: 3})
    assert set(counts.values()) == {2}  # the seeds


def test_values_are_in_the_order_of_the_seeds_in_whatever_order_the_runs_were_finished():
    finished, seeds = Finished(), list(range(8))
    for method in ("SGD", "AdamW"):
        random.Random(method).shuffle(seeds)
        finish_search(finished, method=method)
        finish(finished, runs_at(seeds, method=method), lambda run: {"score": run["seed"]})
    first, second = CONTEST.entries(finished)
    assert first.values("score") == second.values("score") == list(range(8))


def test_method_whose_seeds_are_not_all_finished_is_left_out():
    finished = Finished()
    for method, seeds in (("SGD", range(3)), ("AdamW", (0, 2))):
        finish_search(finished, method=method)
        finish(finished, runs_at(seeds, method=method), lambda _: {"score": 1})
    assert [entry.config["method"] for entry in CONTEST.entries(finished)] == ["SGD"]


def test_runs_at_another_rate_than_the_best_one_are_left_out():
    finished = Finished()
    finish(finished, [*runs_at(range(3)), *runs_at(range(3), lr=1.0)], lambda run: {"score": 1})
    assert CONTEST.entries(finished) == []
    finish_search(finished)
    assert [entry.config["lr"] for entry in CONTEST.entries(finished)] == [2.0]


def test_baseline_comes_first_and_others_are_named_by_what_differs():
    (group,) = grouped(ENTRIES, "data").values()
    assert list(group) == ["SGD", "SGD, no momentum", "Spectral(0.5)", "SGD, 2 x the steps"]
    assert group.baseline is group["SGD"] is SGD


def test_nothing_else_stands_in_for_a_baseline_that_is_missing():
    assert grouped(ENTRIES[:-1], "data") == {}
    assert grouped([entry(method="AdamW", data="mnist"), *ENTRIES], "data").keys() == {("digits",)}
