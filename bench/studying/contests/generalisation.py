"""What the questions about accuracies on test samples have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..question import Answer, Config, Finished, Question, Scope
from ..training import train
from .accuracies import draw, height, numbers, tables
from .columns import Layout, columns
from .contest import Contest
from .tuning import usual_rates

MOMENTUM = 0.9
SEEDS = range(12)  # with ten, no p-value would be small enough for Holm's correction for the methods of `labels`


def contest(measure: str) -> Contest:
    """Rates are chosen by this accuracy on the validation samples, and by their loss where it does not decide."""

    def scores(outcome: dict[str, Any]) -> Sequence[float]:
        return outcome[measure], -math.inf if outcome["loss"] is None else -outcome["loss"]

    return Contest(usual_rates, scores, in_search={"evaluate": "validation"}, search_seeds=(100, 101, 102))


def question(
    title: str, methods: Callable[[Scope], Iterable[Config]], layout: Layout, measure: str = "accuracy"
) -> Question:
    """The question which of the methods is the most accurate on the test samples, each at its best rate.

    Args:
        title: of the question.
        methods: configurations without `lr`, `seed` and `evaluate`.
        layout: of the tables and the figure.
        measure: the accuracy that decides on the rates.
    """
    of_methods = contest(measure)

    def plan(finished: Finished, scope: Scope) -> list[Config]:
        """For each method the search for its best rate, and all seeds at that rate."""
        seeds = SEEDS[:2] if scope.quick else SEEDS
        bases = (base | {"evaluate": "test"} for base in methods(scope))
        return [run for base in bases for run in of_methods.plan(finished, base, seeds)]

    def answer(finished: Finished) -> Answer:
        """Accuracies by setting and method."""
        found = columns(of_methods.entries(finished), layout)
        return Answer(
            tables(found), {"accuracies": (lambda figure: draw(figure, found), height(found))}, numbers(found)
        )

    return Question(title, plan, train, answer)
