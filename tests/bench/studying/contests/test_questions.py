"""Which methods the questions compare in which settings, and which of their runs are planned and count."""

import pytest
from contest_cases import BASE, LAYOUT, entry, finish, in_columns

from bench.studying.contests import accuracies, generalisation
from bench.studying.question import Finished, Line, Scope
from bench.studying.questions import batches, imbalance, labels, stability

FULL = Scope(quick=False, data=("digits", "fashion-mnist"))
CONTESTS = dict.fromkeys((labels, imbalance, batches), generalisation.SEEDS) | {stability: stability.SEEDS}


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


def test_both_data_sets_have_clean_labels_and_both_kinds_of_wrong_ones():
    found = {}
    for base in labels.methods(FULL):
        found.setdefault((base["data"], base["model"]), set()).add(base["labels"])
    assert len(found) == 4
    assert all(kinds >= {"clean", "symmetric 0.4", "pairwise 0.4"} for kinds in found.values())


def test_class_weights_are_compared_where_classes_differ_in_size_only():
    defects = {run["labels"] for run in imbalance.methods(FULL) if run["method"] == "class weights"}
    assert defects == {"imbalanced 50"}


def test_losses_are_compared_at_rates_up_to_the_first_that_does_not_halve_them():
    finished = Finished()
    while runs := [run for run in stability.CONTEST.search(finished, BASE).runs if run not in finished]:
        finish(
            finished,
            runs,
            lambda run: {"training_loss": abs(run["lr"] - 0.1) + (run["lr"] > 0.5), "initial_loss": 2.3},
        )
    search = stability.CONTEST.search(finished, BASE)
    assert search.largest == pytest.approx(0.4)
    assert max(line.config["lr"] for line in finished) == pytest.approx(0.4 * 2**0.5)


def test_quick_batches_have_one_kind_of_labels():
    assert {run["labels"] for run in batches.methods(Scope(quick=True, data=("digits",)))} == {"clean"}


def test_upgrad_is_compared_in_two_settings_only():
    settings = [(run["data"], run["model"], run["labels"]) for run in labels.methods(FULL) if run["method"] == "UPGrad"]
    assert settings == [("digits", "MLP", "clean"), ("digits", "MLP", "symmetric 0.4")]


@pytest.mark.parametrize(("question", "seeds"), CONTESTS.items())
def test_seeds_are_enough_for_the_correction(question, seeds):
    smallest = 2.0 ** (1 - len(seeds))
    assert all(smallest * (len(names) - 1) < 0.05 for names in families(question).values())


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
