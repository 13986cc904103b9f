"""The time of a step of each method, for comparisons at equal time."""

from __future__ import annotations

from typing import Any

from ..data import DIGITS, Sources
from ..methods import METHODS
from ..question import Answer, Config, Finished, Question, Scope, Table, slug
from ..step_times import step_seconds

# Those of other questions: data, model and batch size.
SETTINGS = (
    (DIGITS, "MLP", 5),
    (DIGITS, "MLP", 50),
    (DIGITS, "MLP", 500),
    (DIGITS, "CNN", 50),
    ("fashion-mnist", "MLP", 5),
    ("fashion-mnist", "MLP", 64),
    ("fashion-mnist", "MLP", 500),
    ("fashion-mnist", "CNN", 64),
)
LEFT_OUT = {"UPGrad"}  # it needs a package that need not be installed
ROUNDS, QUICK_ROUNDS = 10, 2


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """All methods in all settings whose data are there."""
    settings = [setting for setting in SETTINGS if setting[0] in scope.data]
    return [
        {
            "data": data,
            "samples": 500,
            "labels": "clean",
            "model": model,
            "batch_size": batch_size,
            "method": method,
            "momentum": 0.9,
            "rounds": QUICK_ROUNDS if scope.quick else ROUNDS,
        }
        for data, model, batch_size in (settings[1:2] if scope.quick else settings)
        for method in (list(METHODS)[:3] if scope.quick else METHODS)
        if method not in LEFT_OUT
    ]


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """Times in seconds, and their ratio to those of SGD."""
    return step_seconds(config | {"seed": 0, "evaluate": "test"}, sources, config["rounds"])


def answer(finished: Finished) -> Answer:
    """The ratios to SGD by method and setting, and the milliseconds of SGD."""
    groups = finished.grouped("data", "model", "batch_size")
    ratios = {setting: {line.config["method"]: line.outcome for line in lines} for setting, lines in groups.items()}
    header = ("method", "gradients", *(f"{data}, {model}, B = {size}" for data, model, size in ratios))
    methods = dict.fromkeys(method for of_setting in ratios.values() for method in of_setting)
    rows = [
        [method, str(METHODS[method].gradients), *(cell(each, method) for each in ratios.values())]
        for method in methods
    ]
    numbers = {
        slug(*setting, method): f"{outcome['ratio']:.2f}"
        for setting, of_setting in ratios.items()
        for method, outcome in of_setting.items()
    }
    return Answer({"table": Table(header, rows)}, numbers=numbers)


def cell(of_setting: dict[str, dict[str, Any]], method: str) -> str:
    """Of SGD the milliseconds, of others the ratio."""
    if method not in of_setting:
        return ""
    outcome = of_setting[method]
    return f"{1e3 * outcome['seconds']:.2f} ms" if method == "SGD" else f"{outcome['ratio']:.2f}"


QUESTION = Question("How long does a step of each method take?", plan, run, answer, alone=True)
