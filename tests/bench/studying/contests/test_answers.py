"""What tables, figures and numbers say of the accuracies and losses of methods beside each other."""

import math

import pytest
from contest_cases import ENTRIES, SGD, SPECTRAL, entry, in_columns
from matplotlib.figure import Figure

from bench.studying.contests import accuracies, columns, losses
from bench.studying.contests.columns import Layout
from bench.studying.methods import METHODS
from bench.studying.question import slug


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
    names = ("settings", "below", "above", "mean", "least", "largest", "below_longer")
    mean = f"{math.sqrt(math.sqrt(0.5) * 3):.2f}"
    assert [numbers[f"spectral_0_5.{name}"] for name in names] == ["2", "0", "0", mean, "0.71", "3.00", "1"]


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


def test_all_dots_are_inside_of_their_panel():
    losing = entry((1.0, 1.0), (0.01, 0.01), method="clipping (median)")
    figure = Figure()
    accuracies.draw(figure, in_columns([SPECTRAL, SGD, losing]))
    (axes,) = figure.axes
    panel, left = axes.get_window_extent(), axes.transData.transform((-54, 0))[0]  # that of clipping, in pixels
    assert left > panel.x0 + 0.04 * panel.width


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
    names = ("mean", "least", "largest", "above", "below")
    assert [numbers[f"clean.accuracy.adamw.{name}"] for name in names] == ["+5.0", "-6.0", "+20.0", "2", "1"]


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


def test_what_rounds_to_zero_has_a_plus():
    assert [columns.points(value) for value in (-0.04, 0.04, -0.06)] == ["+0.0", "+0.0", "-0.1"]


def test_slugs_are_words_for_placeholders():
    assert slug("Trace(-0.5)") == "trace_minus_0_5"
    assert slug("fashion-mnist", 0.9, "exact Spectral(16)") == "fashion_mnist.0_9.exact_spectral_16"
