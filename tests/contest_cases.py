"""Runs of contests between methods, and entries with known losses and accuracies."""

from bench.studying.contests.columns import Layout, columns
from bench.studying.contests.contest import Entry
from bench.studying.question import Line

BASE = {
    "data": "digits",
    "model": "MLP",
    "labels": "clean",
    "method": "SGD",
    "batch_size": 5,
    "momentum": 0.9,
    "steps": 10,
}
LAYOUT = Layout(("data", "model"), ("labels",), {"accuracy": ""})


def finish(finished, runs, outcome):
    for run in runs:
        finished.add(Line(run, outcome(run), 1.0, {}))


def runs_at(seeds, **changes):
    return [BASE | {"lr": 2.0, "seed": seed} | changes for seed in seeds]


def entry(of_losses=(0.5, 0.5), of_accuracies=(0.5, 0.5), **changes):
    outcomes = [
        {"training_loss": loss, "initial_loss": 2.0, "accuracy": accuracy, "diverged": loss is None}
        for loss, accuracy in zip(of_losses, of_accuracies, strict=True)
    ]
    return Entry(BASE | {"lr": 0.1, "labels": "clean"} | changes, outcomes)


SGD, SPECTRAL = entry((0.5, 1.0), (0.5, 0.6)), entry((0.25, 1.0), (0.7, 0.6), method="Spectral(0.5)")
ENTRIES = [SPECTRAL, entry(steps=20), entry(momentum=0.0), SGD]


def in_columns(entries, layout=LAYOUT):
    return columns(entries, layout)
