"""The choice, for every parameter, of the fastest exact strategy within the memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..contributions.buffers import Empty
from ..contributions.cost import SHARE, Cost
from ..contributions.factor import Factor
from ..contributions.rates import rates

# How many choices are remembered. There are more where sequences have any length; they are planned again.
_MOST_CHOICES = 10_000


@dataclass
class Choice:
    """The strategy for one parameter's contributions of given shapes.

    Attributes:
        name: the parameter's name.
        strategies: the possible strategies, and what each costs.
        plain: the cost of the parameter's ordinary gradient, which holds the inputs and the output gradients.
        device, dtype: those of the contributions, whose rates count.
        strategy: the name of the chosen one.
        reason: why it was chosen, or why there is no other.
    """

    name: str
    strategies: dict[str, Cost]
    plain: Cost
    device: torch.device
    dtype: torch.dtype
    strategy: str
    reason: str

    @property
    def cost(self) -> Cost:
        """The cost of the chosen strategy."""
        return self.strategies[self.strategy]

    @property
    def why(self) -> str:
        """The reason, and the time that the other strategies would take, for the user."""
        costs = {name: cost for name, cost in self.strategies.items() if name != self.strategy}
        others = [f"{name} {1e3 * self.seconds(cost):.3g} ms" for name, cost in costs.items()]
        return f"{self.reason} ({', '.join(others)})" if others else self.reason

    @property
    def smallest(self) -> str:
        """The strategy that holds the least memory."""
        return min(self.strategies, key=lambda name: self.strategies[name].held)

    def fastest(self, limit: float = math.inf) -> str:
        """The strategy that takes the least time of those that hold no more than `limit` bytes."""
        within = [name for name, cost in self.strategies.items() if cost.held <= limit]
        return min(within, key=lambda name: self.seconds(self.strategies[name]))

    def seconds(self, cost: Cost) -> float:
        """The estimated time of `cost` on the device."""
        return cost.seconds(rates(self.device, self.dtype))

    def choose(self, strategy: str, reason: str) -> None:
        """Choose `strategy`, because it is `reason`."""
        self.strategy, self.reason = strategy, reason


class Planner:
    """The choices for the parameters of one captured model.

    Between `begin` and `finish` it notes the contributions of one backward. Choices for shapes that were seen before
    are not made again.

    Args:
        budget: how many bytes the gradients, or the inputs and output gradients in their place, may take at the end of
            a backward. With infinity they may take what the fastest strategies take, and with None those of each layer
            may take `SHARE` times the memory of its inputs and output gradients.
    """

    def __init__(self, budget: float | None) -> None:
        self.budget = budget
        self._known: dict[tuple, Choice] = {}
        self._current: dict[str, Choice] = {}
        self._is_new = False
        # Of the last backward that ended, the arguments of `_complete`.
        self._ended: tuple[dict[str, Choice], Callable[[], list[tuple[str, Factor]]], bool] = {}, list, True

    def begin(self) -> None:
        """Forget which parameters took part in the last backward."""
        self._current = {}

    def apply(self, name: str, factor: Factor, needs_gram: bool, empty: Empty) -> Factor:
        """The contributions in the form that the strategy chosen for them works on.

        Args:
            name: the parameter's name.
            factor: its contributions.
            needs_gram: whether the statistics include the Gramian.
            empty: allocates the memory of gradients that are formed.
        """
        return factor.apply(self.note(name, factor, needs_gram).strategy, empty)

    def note(self, name: str, factor: Factor, needs_gram: bool) -> Choice:
        """The choice for `factor`, which takes part in the backward; it is made here if the shapes are new."""
        choice = self._current[name] = self._choice(name, factor, needs_gram)
        return choice

    def _choice(self, name: str, factor: Factor, needs_gram: bool) -> Choice:
        example = factor.example
        key = name, needs_gram, factor.signature, example.dtype, example.device
        choice = self._known.get(key)
        if choice is None:
            choice = self._known[key] = self._chosen(name, factor, needs_gram)
            self._is_new = True
        return choice

    def _chosen(self, name: str, factor: Factor, needs_gram: bool) -> Choice:
        if len(self._known) > _MOST_CHOICES:
            self._known.clear()
        strategies, example = factor.strategies(needs_gram), factor.example
        first = next(iter(strategies))
        choice = Choice(name, strategies, factor.plain(), example.device, example.dtype, first, factor.why)
        if len(strategies) == 1:
            return choice
        if self.budget is None:
            strategy = choice.fastest(SHARE * choice.plain.held)
            choice.choose(strategy, "fastest" if strategy == choice.fastest() else "fastest in little memory")
        elif self.budget == math.inf:
            choice.choose(choice.fastest(), "fastest")
        else:
            # How much the other parameters of this backward will hold is not known yet.
            choice.choose(choice.smallest, "smallest")
        return choice

    def finish(self, outline: Callable[[], list[tuple[str, Factor]]], needs_gram: bool) -> None:
        """End the backward. For later backwards of the same shapes the choices are within the budget.

        Args:
            outline: gives the names of the parameters that were not noted, as they have only one strategy, and factors
                of the same shapes as their contributions. It is asked only where these choices matter.
            needs_gram: whether the statistics include the Gramian.

        Raises:
            ValueError: if no choice of strategies is within the budget.
        """
        noted, self._current = self._current, {}
        if self.budget not in (None, math.inf):
            choices = self._complete(noted, outline, needs_gram)
            # Shapes that are known one by one may have come together for the first time.
            if self._is_new or _held(choices) > self.budget:
                fit(choices, self.budget)
        self._is_new, self._ended = False, (noted, outline, needs_gram)

    def _complete(
        self, noted: dict[str, Choice], outline: Callable[[], list[tuple[str, Factor]]], needs_gram: bool
    ) -> list[Choice]:
        """The choices that were noted in a backward, and those for its parameters with only one strategy."""
        others = {name: self._choice(name, factor, needs_gram) for name, factor in outline() if name not in noted}
        return [*noted.values(), *others.values()]

    def choices(self) -> list[Choice]:
        """The choices for the parameters that took part in the last backward that ended."""
        return self._complete(*self._ended)


def fit(choices: Iterable[Choice], budget: float) -> None:
    """Choose the fastest strategies that together are within the budget, by a greedy search.

    It starts from the fastest of all, and takes smaller ones in the place of those for which that costs the least time
    per byte saved, until they fit.

    Raises:
        ValueError: if the smallest strategies together exceed the budget.
    """
    choices = list(choices)
    least = sum(choice.strategies[choice.smallest].held for choice in choices)
    if least > budget:
        raise ValueError(
            f"memory_budget is {budget:.0f} bytes, but the smallest ways of this model and batch take {least}: pass at"
            f" least memory_budget={least}, or a smaller batch"
        )
    for choice in choices:
        if len(choice.strategies) > 1:
            choice.choose(choice.fastest(), "fastest")
    held = _held(choices)
    while held > budget:
        _, _, choice, strategy = min((_price(*move), number, *move) for number, move in enumerate(_moves(choices)))
        held -= choice.cost.held - choice.strategies[strategy].held
        choice.choose(strategy, "within memory_budget")


def _held(choices: list[Choice]) -> int:
    return sum(choice.cost.held for choice in choices)


def _moves(choices: list[Choice]) -> list[tuple[Choice, str]]:
    """Every possible change to a strategy that holds less memory."""
    return [
        (choice, name) for choice in choices for name, cost in choice.strategies.items() if cost.held < choice.cost.held
    ]


def _price(choice: Choice, strategy: str) -> float:
    """The seconds that a change to `strategy` costs per byte saved."""
    now, then = choice.cost, choice.strategies[strategy]
    return (choice.seconds(then) - choice.seconds(now)) / (now.held - then.held)
