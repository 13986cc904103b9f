"""Methods beside each other: which runs are planned and count, and what tables say of them."""

import math

import pytest
from matplotlib.figure import Figure

from bench.studying.contests import fits, rankings
from bench.studying.contests.contest import Contest, Entry, grouped, named
from bench.studying.question import Finished, Line, Scope, slug
from bench.studying.questions import labels, stability
from bench.studying.step_times import TIMES, key

BASE = {"data": "digits", "model": "MLP", "method": "SGD", "batch_size": 5, "momentum": 0.9, "steps": 10}
CONTEST = Contest(lambda _: [1.0, 2.0, 4.0], lambda outcome: outcome["score"], {"evaluate": "validation"})


def finish(finished, runs, outcome):
    for run in runs:
        finished.add(Line(run, outcome(run), 1.0, {}))


def test_runs_that_count_follow_the_search_at_its_best_rate():
    finished = Finished()
    searching = CONTEST.plan(finished, BASE, range(3))
    assert {(run["lr"], run["seed"]) for run in searching} == {(lr, seed) for lr in (1, 2, 4) for seed in (100, 101)}
    assert {run["evaluate"] for run in searching} == {"validation"}
    finish(finished, searching, lambda run: {"score": -abs(run["lr"] - 2)})
    counting = CONTEST.plan(finished, BASE, range(3))[len(searching) :]
    assert counting == [BASE | {"lr": 2.0, "seed": seed} for seed in range(3)]
    assert CONTEST.entries(finished) == []
    finish(finished, counting, lambda run: {"score": run["seed"]})
    finished.add(Line({"method": TIMES}, {key(BASE): 1.5}, 1.0, {}))
    (entry,) = CONTEST.entries(finished)
    assert entry.config == BASE | {"lr": 2.0}
    assert entry.values("score") == [0, 1, 2]
    assert entry.relative_time(steps=5) == 3.0


def test_method_whose_seeds_are_not_all_finished_is_left_out():
    finished = Finished()
    finish(finished, [BASE | {"lr": 1.0, "seed": seed} for seed in range(3)], lambda _: {"score": 1})
    finish(finished, [BASE | {"lr": 1.0, "method": "AdamW", "seed": seed} for seed in range(2)], lambda _: {"score": 1})
    assert [entry.config["method"] for entry in CONTEST.entries(finished)] == ["SGD"]


def entry(losses=(0.5, 0.5), accuracies=(0.5, 0.5), **changes):
    outcomes = [{"training_loss": a, "accuracy": b} for a, b in zip(losses, accuracies, strict=True)]
    return Entry(BASE | {"lr": 0.1, "labels": "clean"} | changes, outcomes, 2.0)


ENTRIES = [
    entry(method="Spectral(0.5)", losses=(0.25, 1.0), accuracies=(0.7, 0.6)),
    entry(steps=20),
    entry(momentum=0.0),
    entry(losses=(0.5, 1.0), accuracies=(0.5, 0.6)),
]


def test_baseline_comes_first_and_others_are_named_by_what_differs():
    (group,) = grouped(ENTRIES, "data").values()
    assert list(named(group)) == ["SGD", "SGD, no momentum", "Spectral(0.5)", "SGD, 2 x the steps"]
    assert named(group)["SGD"] is ENTRIES[-1]


def test_group_without_a_baseline_is_left_out():
    assert grouped([entry(method="AdamW", data="mnist"), *ENTRIES], "data").keys() == {("digits",)}


def test_losses_are_compared_by_the_geometric_means_of_their_ratios():
    table = fits.table([ENTRIES[0], ENTRIES[1], ENTRIES[3]], lambda _: 0.4)
    rows = {row[2]: row for row in table.rows}
    assert rows["SGD"][4] == "1"
    assert rows["Spectral(0.5)"][4].startswith("0.71 (")  # (1/2 * 1)^(1/2)
    assert rows["SGD, 2 x the steps"][5:8] == ["4.00", "0.1", "0.4"]
    assert all(len(row) == len(table.header) for row in table.rows)
    assert fits.numbers([ENTRIES[0], ENTRIES[3]]) == {"digits.5.0_9.spectral_0_5": f"{math.sqrt(0.5):.2f}"}


def test_accuracies_are_compared_by_their_differences_in_percentage_points():
    (table,) = rankings.tables(ENTRIES).values()
    rows = {row[0]: row for row in table.rows}
    assert rows["SGD"][2] == "55.0 %"
    assert rows["Spectral(0.5)"][2].startswith("+10.0 (")
    numbers = rankings.numbers(ENTRIES)
    assert numbers["digits.mlp.clean.sgd"] == "55.0"
    assert numbers["digits.mlp.clean.spectral_0_5"] == "+10.0"


def test_star_marks_what_differs_after_the_correction():
    def family(gain):
        return [
            entry([1.0] * 10, [0.5 + seed / 100 for seed in range(10)]),
            entry([1.0] * 10, [0.5 + seed / 100 + gain(seed) for seed in range(10)], method="AdamW"),
        ]

    for gain, star in ((lambda seed: 0.1 + seed / 1000, True), (lambda seed: (-1) ** seed / 10, False)):
        (table,) = rankings.tables(family(gain)).values()
        assert table.rows[1][2].endswith(" *") is star


def test_method_that_was_not_run_on_some_labels_has_an_empty_cell():
    (table,) = rankings.tables([*ENTRIES, entry(labels="pairwise 0.4")]).values()
    assert [row[3] for row in table.rows] == ["50.0 %", "", "", ""]


@pytest.mark.parametrize("module", [fits, rankings])
def test_figures_are_drawn(module):
    figure = Figure()
    module.draw(figure, ENTRIES[::3])
    assert figure.axes[0].get_title().startswith("digits, ")


def test_slugs_are_words_for_placeholders():
    assert slug("fashion-mnist", 0.9, "exact Spectral(16)") == "fashion_mnist.0_9.exact_spectral_16"


def losses(finished, base, by_rate):
    for lr, value in by_rate.items():
        runs = [base | {"lr": lr, "seed": seed} for seed in (100, 101)]
        finish(finished, runs, lambda run, value=value: {"training_loss": value, "initial_loss": 2.3})


def test_largest_rate_is_the_last_one_that_lowers_the_loss():
    finished = Finished()
    runs, largest = stability.limit(finished, BASE, 0.1)
    assert [run["lr"] for run in runs] == [0.2, 0.2]
    assert largest is None
    losses(finished, BASE, {0.2: 1.0, 0.4: 2.0, 0.8: 2.4})
    runs, largest = stability.limit(finished, BASE, 0.1)
    assert [run["lr"] for run in runs] == [0.2, 0.2, 0.4, 0.4, 0.8, 0.8]
    assert largest == 0.4
    losses(finished, BASE, {0.4: None})
    assert stability.limit(finished, BASE, 0.1)[1] == 0.2


@pytest.mark.parametrize("question", [labels, stability])
def test_all_methods_have_the_same_settings(question):
    bases = list(question.methods(Scope(quick=False, data=("digits", "fashion-mnist"))))
    assert len({str(sorted(base.items())) for base in bases}) == len(bases)
    settings = {}
    for base in bases:
        setting = tuple(value for name, value in base.items() if name not in ("method", "momentum", "steps"))
        settings.setdefault(setting, set()).add(base["method"])
    assert len(set(map(frozenset, settings.values()))) == 1
    assert "SGD" in next(iter(settings.values()))
