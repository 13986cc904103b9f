"""The choice, for every parameter, of the cheapest exact way to its part of the statistics and the direction."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .cost import SHARE, Cost
from .factors import Factor
from .rates import rates
from .workspace import Empty

# Shapes to remember: more come from sequences of any length, and are planned again.
_MOST = 10_000


@dataclass
class Choice:
    """How one parameter's contributions of given shapes are treated.

    Attributes:
        name: of the parameter.
        ways: what each way costs.
        plain: what the parameter's ordinary gradient costs; it holds inputs and output gradients.
        device, dtype: what the rates are for.
        way: the chosen one.
        reason: for it; with one way, why there is no other.
    """

    name: str
    ways: dict[str, Cost]
    plain: Cost
    device: torch.device
    dtype: torch.dtype
    way: str
    reason: str

    @property
    def why(self) -> str:
        """The reason, beside what the other ways would take, for the user."""
        others = [f"{way} {1e3 * self.seconds(cost):.3g} ms" for way, cost in self.ways.items() if way != self.way]
        return f"{self.reason} ({', '.join(others)})" if others else self.reason

    @property
    def smallest(self) -> str:
        """The way that holds the least."""
        return min(self.ways, key=lambda way: self.ways[way].held)

    def fastest(self, limit: float = math.inf) -> str:
        """The way that takes the least time of those that hold no more than `limit` bytes."""
        within = [way for way, cost in self.ways.items() if cost.held <= limit]
        return min(within, key=lambda way: self.seconds(self.ways[way]))

    def seconds(self, cost: Cost) -> float:
        """Estimated time on the device."""
        return cost.seconds(rates(self.device, self.dtype))

    def choose(self, way: str, reason: str) -> None:
        """Take `way`, which was chosen because it is `reason`."""
        self.way, self.reason = way, reason


class Planner:
    """Ways of one captured model.

    Args:
        budget: bytes that the gradients, or the factors in their place, may take at the end of a backward; infinity
            for as many as the fastest ways take, None for a layer's share.
    """

    def __init__(self, budget: float | None) -> None:
        self.budget = budget
        self._known: dict[tuple, Choice] = {}
        self._current: dict[str, Choice] = {}
        self._remembered: tuple[object, dict[str, Choice]] = None, {}
        self._is_new = False

    def begin(self) -> None:
        """A backward begins."""
        self._current = {}

    def settle(self, name: str, factor: Factor, needs_gram: bool, empty: Empty) -> Factor:
        """`factor` in the way that was chosen for it; `needs_gram` says what the statistics need."""
        return factor.settled(self.note(name, factor, needs_gram).way, empty)

    def note(self, name: str, factor: Factor, needs_gram: bool) -> Choice:
        """The choice for `factor`, made if its shapes are new."""
        example = factor.example
        key = name, needs_gram, factor.signature, example.dtype, example.device
        choice = self._known.get(key)
        if choice is None:
            choice = self._known[key] = self._chosen(name, factor, needs_gram)
            self._is_new = True
        self._current[name] = choice
        return choice

    def remember(self, key: object, names: list[str]) -> None:
        """Keep this backward's choices for `names` under `key`, which stands for all that they depend on."""
        self._remembered = key, {name: self._current[name] for name in names}

    def recall(self, key: object) -> bool:
        """Whether choices were kept under `key`; if so they are this backward's too."""
        if key != self._remembered[0]:
            return False
        self._current |= self._remembered[1]
        return True

    def _chosen(self, name: str, factor: Factor, needs_gram: bool) -> Choice:
        if len(self._known) > _MOST:
            self._known.clear()
        ways, example = factor.ways(needs_gram), factor.example
        choice = Choice(name, ways, factor.plain(), example.device, example.dtype, next(iter(ways)), factor.why)
        if len(ways) == 1:
            return choice
        if self.budget is None:
            way = choice.fastest(SHARE * choice.plain.held)
            choice.choose(way, "fastest" if way == choice.fastest() else "fastest in little memory")
        elif self.budget == math.inf:
            choice.choose(choice.fastest(), "fastest")
        else:
            # What the others of this backward will take is not known yet.
            choice.choose(choice.smallest, "smallest")
        return choice

    def finish(self) -> list[Choice]:
        """A backward has ended: plan new shapes within the budget; returns the choices for its parameters.

        Raises:
            ValueError: if no choice of ways is within the budget.
        """
        choices = list(self._current.values())
        # Known shapes may have come together anew.
        if self.budget not in (None, math.inf) and (self._is_new or _held(choices) > self.budget):
            fit(choices, self.budget)
        self._is_new = False
        return choices


def fit(choices: Iterable[Choice], budget: float) -> None:
    """The fastest ways, but where they exceed the budget the smaller ones that cost the least time per byte saved.

    Raises:
        ValueError: if all smallest ways together exceed the budget.
    """
    choices = list(choices)
    least = sum(choice.ways[choice.smallest].held for choice in choices)
    if least > budget:
        raise ValueError(
            f"memory_budget is {budget:.0f} bytes, but the smallest ways of this model and batch take {least}: pass at"
            f" least memory_budget={least}, or a smaller batch"
        )
    for choice in choices:
        if len(choice.ways) > 1:
            choice.choose(choice.fastest(), "fastest")
    held = _held(choices)
    while held > budget:
        _, _, choice, way = min((_price(*move), number, *move) for number, move in enumerate(_moves(choices)))
        held -= choice.ways[choice.way].held - choice.ways[way].held
        choice.choose(way, "within memory_budget")


def _held(choices: list[Choice]) -> int:
    return sum(choice.ways[choice.way].held for choice in choices)


def _moves(choices: list[Choice]) -> list[tuple[Choice, str]]:
    """Changes to ways that hold less."""
    return [
        (choice, way)
        for choice in choices
        for way, cost in choice.ways.items()
        if cost.held < choice.ways[choice.way].held
    ]


def _price(choice: Choice, way: str) -> float:
    """Seconds per byte saved."""
    now, then = choice.ways[choice.way], choice.ways[way]
    return (choice.seconds(then) - choice.seconds(now)) / (now.held - then.held)
