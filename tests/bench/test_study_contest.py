"""Methods beside each other: which runs are planned and count, and what tables and figures say of them."""

import math
import random

import pytest
from matplotlib.figure import Figure

from bench.studying.contests import accuracies, generalisation, losses
from bench.studying.contests.columns import Layout, columns
from bench.studying.contests.contest import Contest, Entry, grouped
from bench.studying.contests.tuning import HALF, usual_rates
from bench.studying.methods import METHODS
from bench.studying.question import Finished, Line, Scope, slug
from bench.studying.questions import batches, imbalance, labels, stability

BASE = {
    "data": "digits",
    "model": "MLP",
    "labels": "clean",
    "method": "SGD",
    "batch_size": 5,
    "momentum": 0.9,
    "steps": 10,
}
CONTEST = Contest(lambda _: [1.0, 2.0, 4.0], lambda outcome: (outcome["score"],), {"evaluate": "validation"})
FULL = Scope(quick=False, data=("digits", "fashion-mnist"))


def finish(finished, runs, outcome):
    for run in runs:
        finished.add(Line(run, outcome(run), 1.0, {}))


def runs_at(seeds, **changes):
    return [BASE | {"lr": 2.0, "seed": seed} | changes for seed in seeds]


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


def entry(of_losses=(0.5, 0.5), of_accuracies=(0.5, 0.5), **changes):
    outcomes = [
        {"training_loss": loss, "initial_loss": 2.0, "accuracy": accuracy, "diverged": loss is None}
        for loss, accuracy in zip(of_losses, of_accuracies, strict=True)
    ]
    return Entry(BASE | {"lr": 0.1, "labels": "clean"} | changes, outcomes)


SGD, SPECTRAL = entry((0.5, 1.0), (0.5, 0.6)), entry((0.25, 1.0), (0.7, 0.6), method="Spectral(0.5)")
ENTRIES = [SPECTRAL, entry(steps=20), entry(momentum=0.0), SGD]
LAYOUT = Layout(("data", "model"), ("labels",), {"accuracy": ""})


CONTESTS = dict.fromkeys((labels, imbalance, batches), generalisation.SEEDS) | {stability: stability.SEEDS}


def in_columns(entries, layout=LAYOUT):
    return columns(entries, layout)


def test_baseline_comes_first_and_others_are_named_by_what_differs():
    (group,) = grouped(ENTRIES, "data").values()
    assert list(group) == ["SGD", "SGD, no momentum", "Spectral(0.5)", "SGD, 2 x the steps"]
    assert group.baseline is group["SGD"] is SGD


def test_nothing_else_stands_in_for_a_baseline_that_is_missing():
    assert grouped(ENTRIES[:-1], "data") == {}
    assert grouped([entry(method="AdamW", data="mnist"), *ENTRIES], "data").keys() == {("digits",)}


def test_losses_are_compared_by_the_geometric_means_of_their_ratios():
    table = losses.table([SPECTRAL, SGD, entry(steps=20)], lambda _: 0.4)
    rows = {row[2]: row for row in table.rows}
    assert rows["SGD"][3:5] == [f"{math.sqrt(0.5):.3g} (1 failed)", "1"]
    assert rows["Spectral(0.5)"][3:5] == ["0.5 (1 failed)", "0.71 (0.50 to 1.00)"]
    assert rows["SGD, 2 x the steps"][5:7] == ["0.1", "0.4"]
    assert all(len(row) == len(table.header) for row in table.rows)
    others = [entry((loss, loss), batch_size=7, **changes) for loss, changes in ((1.0, {}), (4.0, {"steps": 20}))]
    worse = entry((3.0, 3.0), batch_size=7, method="Spectral(0.5)")
    numbers = losses.numbers([SPECTRAL, SGD, *others, worse])
    assert numbers["digits.5.0_9.spectral_0_5"] == "0.71"
    assert numbers["digits.7.0_9.spectral_0_5"] == "3.00"
    names = ("settings", "below", "above", "least", "largest", "below_longer")
    assert [numbers[f"spectral_0_5.{name}"] for name in names] == ["2", "0", "0", "0.71", "3.00", "1"]


def test_training_that_diverged_has_the_loss_at_its_start_and_counts_as_failed():
    (_, row) = losses.table([SGD, entry((None, 2.0), method="AdamW")], lambda _: None).rows
    assert row[3] == "2 (2 failed)"
    assert row[4].startswith("2.83 (")


def test_accuracies_are_compared_by_their_differences_in_percentage_points():
    (table, _) = accuracies.tables(in_columns(ENTRIES)).values()
    rows = dict(table.rows)
    assert rows["SGD"] == "55.0 %"
    assert rows["Spectral(0.5)"].startswith("+10.0 (")
    numbers = accuracies.numbers(in_columns(ENTRIES))
    assert numbers["digits.mlp.clean.accuracy.sgd"] == "55.0"
    assert numbers["digits.mlp.clean.accuracy.spectral_0_5"] == "+10.0"


@pytest.mark.parametrize(("question", "seeds"), CONTESTS.items())
def test_star_marks_what_differs_after_the_correction_for_all_methods(question, seeds):
    (names, *_) = families(question).values()
    group = [entry([1.0 for _ in seeds], [0.5 + seed / 100 for seed in seeds])]
    for at, name in enumerate(dict.fromkeys(names[1:])):
        gains = [0.1 + seed / 1000 if at == 0 else (-1) ** seed / 10 for seed in seeds]
        values = [0.5 + seed / 100 + gain for seed, gain in zip(seeds, gains, strict=True)]
        group.append(entry([1.0 for _ in seeds], values, **({"steps": 20} if name == "SGD" else {"method": name})))
    (table, _) = accuracies.tables(in_columns(group)).values()
    assert [row[0] for row in table.rows if row[1].endswith(" *")] == [names[1]]


def test_method_that_was_not_run_on_some_labels_has_an_empty_cell():
    (table, _) = accuracies.tables(in_columns([*ENTRIES, entry(labels="pairwise 0.4")])).values()
    assert {row[0]: row[2] for row in table.rows} == {
        "SGD": "50.0 %",
        "SGD, no momentum": "",
        "Spectral(0.5)": "",
        "SGD, 2 x the steps": "",
    }


def test_figures_have_a_dot_for_each_method_at_its_ratio_or_difference():
    for draw, entries, value, title, scale in (
        (losses.draw, [SPECTRAL, SGD], math.sqrt(0.5), "digits, B = 5", "log"),
        (accuracies.draw, in_columns([SPECTRAL, SGD]), 10, "clean labels", "symlog"),
    ):
        figure = Figure()
        draw(figure, entries)
        (axes,) = figure.axes
        assert (axes.get_title(), axes.get_xscale()) == (title, scale)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["Spectral(0.5)"]
        assert axes.containers[0].lines[0].get_xydata().tolist() == [[pytest.approx(value), 0]]


def test_figures_can_be_drawn_of_what_is_there():
    some = [*ENTRIES, *(entry(**changes) for changes in ({"labels": "pairwise 0.4"}, {"data": "mnist"}))]
    for entries in ([], some):
        losses.draw(Figure(), entries)
        accuracies.draw(Figure(), in_columns(entries))


def test_summary_has_means_over_tables_and_a_sign_for_each_clear_difference():
    seeds = range(12)
    gains = {"digits": 0.1, "mnist": 0.2, "svhn": -0.06, "better?": 0.04, "worse?": -0.03}
    entries = []
    for data, gain in gains.items():
        spread = 1.0 if data.endswith("?") else 0.01
        accuracies_of = [0.5 + gain + spread * (-1) ** seed / 10 for seed in seeds]
        entries += [
            entry([1.0] * 12, [0.5] * 12, data=data),
            entry([1.0] * 12, accuracies_of, data=data, method="AdamW"),
        ]
    entries.append(entry([1.0] * 12, [0.4] * 12, method="SAM(0.1)"))
    found = in_columns(entries)
    summary = accuracies.tables(found)["summary"]
    assert summary.header == ("method", "clean labels (5)")
    assert summary.rows == [["AdamW", "+5.0 ++-"], ["SAM(0.1)", "-10.0 - [1 of 5]"]]
    numbers = accuracies.numbers(found)
    assert [numbers[f"clean.accuracy.adamw.{name}"] for name in ("mean", "above", "below")] == ["+5.0", "2", "1"]


def test_a_figure_is_as_high_as_its_rows_and_methods_ask_for():
    one, other = in_columns([SGD, SPECTRAL]), in_columns([entry(data="mnist"), entry(data="mnist", method="AdamW")])
    more = in_columns([SGD, SPECTRAL, entry(method="AdamW")])
    assert accuracies.height(one) < accuracies.height(more) < accuracies.height([*one, *other])


def test_a_method_has_the_same_place_in_all_panels():
    figure = Figure()
    others = [
        entry(labels="pairwise 0.4"),
        entry(method="Ascent(0.1)"),
        entry(method="Ascent(0.1)", labels="pairwise 0.4"),
    ]
    accuracies.draw(figure, in_columns([SPECTRAL, SGD, *others]))
    places = [[y for _, y in axes.containers[0].lines[0].get_xydata()] for axes in figure.axes]
    assert places == [[0, 1], [1]]


def test_layout_says_what_tables_columns_and_panels_are():
    sizes = {"digits": (5, 1000), "mnist": (5, 1024)}
    settings = [{"data": data, "batch_size": size} for data, of_data in sizes.items() for size in of_data]
    entries = [entry(method=method, **setting) for setting in settings for method in ("SGD", "AdamW")]
    for each in entries:
        each.outcomes[0]["worst"] = each.outcomes[1]["worst"] = 0.25
    layout = Layout(("data", "labels"), ("batch_size",), {"accuracy": "", "worst": "worst class"})
    found = in_columns(entries, layout)
    tables = accuracies.tables(found)
    assert tables.keys() == {"table.digits.clean", "table.mnist.clean", "summary"}
    headings = ["B = 5", "B = 5, worst class", "B = 1024", "B = 1024, worst class"]
    assert list(tables["table.mnist.clean"].header) == ["method", *headings]
    assert tables["table.mnist.clean"].rows[0] == ["SGD", "50.0 %", "25.0 %", "50.0 %", "25.0 %"]
    assert accuracies.numbers(found)["mnist.clean.1024.worst.sgd"] == "25.0"
    figure = Figure()
    accuracies.draw(figure, found)
    rows = {part.get_suptitle(): [axes.get_title() for axes in part.axes] for part in figure.subfigs}
    assert rows.keys() == {"digits, clean labels", "mnist, clean labels"}
    assert rows["digits, clean labels"][3] == "B = 1000\nworst class"
    assert rows["mnist, clean labels"] == [heading.replace(", ", "\n") for heading in headings]


def test_models_and_labels_are_in_the_order_of_their_catalogues():
    kinds = ("pairwise 0.4", "symmetric 0.4", "symmetric 0.2", "clean")
    entries = [entry(model=model, labels=labels) for model in ("CNN", "MLP") for labels in kinds]
    found = in_columns(entries)
    assert list(dict.fromkeys(column.table[1] for column in found)) == ["MLP", "CNN"]
    assert [column.key[0] for column in found[:4]] == ["clean", "symmetric 0.2", "symmetric 0.4", "pairwise 0.4"]


def test_rates_are_chosen_by_the_validation_samples_and_counted_on_those_of_the_test():
    base = {name: value for name, value in BASE.items() if name != "evaluate"}
    question = generalisation.question("", lambda _: [base], LAYOUT, "balanced")
    finished = Finished()
    while runs := [run for run in question.plan(finished, FULL) if run not in finished]:
        for run in runs:
            # The one with the best balanced accuracy has not the best accuracy, and a diverged one does not count.
            good = run["lr"] in (0.05, 0.1)
            loss = None if run["lr"] == 0.05 else 1.0
            finished.add(Line(run, {"balanced": float(good), "accuracy": 0.5 - good / 4, "loss": loss}, 1.0, {}))
    counted = [line.config for line in finished if line.config["evaluate"] == "test"]
    assert {run["lr"] for run in counted} == {0.1}
    assert [run["seed"] for run in counted] == list(generalisation.SEEDS)
    assert {line.config["seed"] for line in finished if line.config["evaluate"] == "validation"} == {100, 101, 102}


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


def test_every_method_has_a_slug_of_its_own():
    assert len({slug(name) for name in METHODS}) == len(METHODS)


def test_settings_that_a_single_seed_decides_are_left_out_of_counts():
    group = [entry((0.01, 2.0)), entry((0.001, 0.001), method="AdamW")]
    others = [entry((0.5, 0.4), batch_size=7), entry((0.4, 0.3), method="AdamW", batch_size=7)]
    numbers = losses.numbers([*group, *others])
    assert (numbers["settings"], numbers["settled"], numbers["adamw.settings"]) == ("2", "1", "1")
    assert numbers["adamw.least"] == numbers["digits.7.0_9.adamw"]


def test_larger_rates_than_that_of_the_baseline_are_counted():
    others = [entry(batch_size=7), entry(method="Spectral(0.5)", batch_size=7)]
    rates = {SGD: 0.4, SPECTRAL: 0.8, others[0]: 0.4, others[1]: 0.4}
    assert losses.larger_rates([*rates], rates.get)["spectral_0_5.faster"] == "1"


def test_slugs_are_words_for_placeholders():
    assert slug("Trace(-0.5)") == "trace_minus_0_5"
    assert slug("fashion-mnist", 0.9, "exact Spectral(16)") == "fashion_mnist.0_9.exact_spectral_16"


def with_losses(finished, by_rate):
    for lr, value in by_rate.items():
        runs = runs_at((100, 101), lr=lr)
        finish(finished, runs, lambda run, value=value: {"training_loss": value, "initial_loss": 2.3})


@pytest.mark.parametrize(
    ("question", "measure"), [(labels, "accuracy"), (imbalance, "balanced_accuracy"), (batches, "accuracy")]
)
def test_measure_that_decides_on_the_rates(question, measure):
    outcome = dict.fromkeys(("accuracy", "balanced_accuracy", "worst_accuracy"), 0.5) | {"loss": 1.0}
    scope, finished = Scope(quick=True, data=("digits",)), Finished()
    while runs := [run for run in question.QUESTION.plan(finished, scope) if run not in finished]:
        finish(finished, runs, lambda run: outcome | ({measure: 0.9} if run["lr"] in (0.1, 0.002) else {}))
    counted = {line.config["lr"] for line in finished if line.config["evaluate"] == "test"}
    assert counted <= {0.1, 0.002}


def test_largest_rate_is_the_last_one_that_halves_the_loss():
    finished = Finished()
    first, second, third = 0.1 * HALF, 0.1 * HALF * HALF, 0.1 * HALF * HALF * HALF
    runs, largest = stability.limit(finished, BASE, 0.1)
    assert [run["lr"] for run in runs] == [first, first]
    assert largest is None
    with_losses(finished, {first: 0.5, second: 1.1, third: 1.2})
    runs, largest = stability.limit(finished, BASE, 0.1)
    assert [run["lr"] for run in runs] == [first, first, second, second, third, third]
    assert largest == second
    with_losses(finished, {second: None})
    assert stability.limit(finished, BASE, 0.1)[1] == first


def families(question):
    """The methods that are compared with each other, by setting: first its data and model, and then the rest."""
    found = {}
    for base in question.methods(FULL):
        ignored = ("method", "steps", "data", "model", *["momentum"] * (question is labels))
        setting = (base["data"], base["model"], *(value for name, value in base.items() if name not in ignored))
        found.setdefault(setting, []).append(base["method"])
    return found


@pytest.mark.parametrize(("question", "seeds"), CONTESTS.items())
def test_all_settings_of_a_model_have_the_same_methods_once(question, seeds):
    bases = [str(sorted(base.items())) for base in question.methods(FULL)]
    assert len(set(bases)) == len(bases)
    found = {}
    for (data, model, *_), names in families(question).items():
        found.setdefault((data, model), set()).add(frozenset({*names} - {"AdamW", "UPGrad", "class weights"}))
    assert all(len(of_settings) == 1 and "SGD" in next(iter(of_settings)) for of_settings in found.values())


def test_cnn_on_larger_images_has_fewer_methods_of_the_catalogue():
    found = {setting[:2]: {*names} - {"UPGrad"} for setting, names in families(labels).items()}
    of_mlp = found["fashion-mnist", "MLP"]
    assert found["fashion-mnist", "CNN"] < of_mlp
    assert found["digits", "CNN"] == of_mlp


def test_class_weights_are_compared_where_classes_differ_in_size_only():
    defects = {run["labels"] for run in imbalance.methods(FULL) if run["method"] == "class weights"}
    assert defects == {"imbalanced 50"}


def test_quick_batches_have_one_kind_of_labels():
    assert {run["labels"] for run in batches.methods(Scope(quick=True, data=("digits",)))} == {"clean"}


def test_upgrad_is_compared_in_two_settings_only():
    settings = [(run["data"], run["model"], run["labels"]) for run in labels.methods(FULL) if run["method"] == "UPGrad"]
    assert settings == [("digits", "MLP", "clean"), ("digits", "MLP", "symmetric 0.4")]


@pytest.mark.parametrize(("question", "seeds"), CONTESTS.items())
def test_seeds_are_enough_for_the_correction(question, seeds):
    smallest = 2.0 ** (1 - len(seeds))
    assert all(smallest * (len(names) - 1) < 0.05 for names in families(question).values())
