"""Methods beside each other, each at the learning rate that suits it best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..methods import METHODS
from ..question import Config, Finished
from ..step_times import TIMES, key
from .tuning import search


@dataclass(frozen=True)
class Contest:
    """How the rate of a method is chosen, and with which seeds the method is run at that rate.

    Attributes:
        first_rates: of a configuration without `lr` and `seed`, the rates that its search begins with.
        score: of an outcome; the search takes the rate with the largest mean.
        in_search: entries in which the runs of the search differ from those that count.
        search_seeds: of the search; those of the runs that count have to be others.
    """

    first_rates: Callable[[Config], Sequence[float]]
    score: Callable[[dict[str, Any]], float]
    in_search: Config = field(default_factory=dict)
    search_seeds: Sequence[int] = (100, 101)

    def search(self, finished: Finished, base: Config) -> tuple[list[Config], float | None]:
        """The runs of the search for a configuration without `lr` and `seed`, and the best rate once it is known."""
        return search(finished, base | self.in_search, self.first_rates(base), self.search_seeds, self.score)

    def plan(self, finished: Finished, base: Config, seeds: Iterable[int]) -> list[Config]:
        """The runs of the search, and then those that count."""
        searching, lr = self.search(finished, base)
        return searching + ([] if lr is None else [base | {"lr": lr, "seed": seed} for seed in seeds])

    def entries(self, finished: Finished) -> list[Entry]:
        """All methods whose runs that count are finished, in the order of the lines.

        Those of which some seeds are still missing are left out.
        """
        counted: dict[tuple[tuple[str, Any], ...], list[dict[str, Any]]] = {}
        for line in finished:
            if line.config["method"] != TIMES and line.config["seed"] not in self.search_seeds:
                without_seed = tuple((name, value) for name, value in line.config.items() if name != "seed")
                counted.setdefault(without_seed, []).append(line.outcome)
        seeds = max(map(len, counted.values()), default=0)
        times = {name: ratio for line in finished.where(method=TIMES) for name, ratio in line.outcome.items()}
        return [
            Entry(dict(config), outcomes, times.get(key(dict(config))))
            for config, outcomes in counted.items()
            if len(outcomes) == seeds
        ]


@dataclass(frozen=True, eq=False)
class Entry:
    """A method at its best rate.

    Attributes:
        config: of its runs, without the seed.
        outcomes: by seed.
        step_time: in units of that of SGD, or None before it is measured.
    """

    config: Config
    outcomes: Sequence[dict[str, Any]]
    step_time: float | None

    def values(self, name: str) -> list[float]:
        """An entry of the outcomes, by seed."""
        return [outcome[name] for outcome in self.outcomes]

    def relative_time(self, steps: int) -> float | None:
        """Of all steps, in units of so many of SGD's."""
        return None if self.step_time is None else self.step_time * self.config["steps"] / steps


def grouped(entries: Iterable[Entry], *by: str) -> dict[tuple[Any, ...], list[Entry]]:
    """The entries by what their configurations have under these names; in each group the baseline, SGD, comes first.

    Groups without it are left out.
    """
    order = list(METHODS)
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry.config[name] for name in by), []).append(entry)
    for group in groups.values():
        group.sort(
            key=lambda each: (each.config["steps"], order.index(each.config["method"]), -each.config["momentum"])
        )
    return {key: group for key, group in groups.items() if group[0].config["method"] == order[0]}


def _rank(config: Config, order: Sequence[str]) -> tuple[int, int, float]:
    """SGD with the fewest steps and the largest momentum comes first."""
    return config["steps"], order.index(config["method"]), -config["momentum"]


def named(group: Sequence[Entry]) -> dict[str, Entry]:
    """A group by the methods' names, with what else differs from the baseline."""
    return {_name(entry.config, group[0].config): entry for entry in group}


def _name(config: Config, baseline: Config) -> str:
    steps = f", {config['steps'] // baseline['steps']} x the steps" if config["steps"] > baseline["steps"] else ""
    momentum = ", no momentum" if config["momentum"] < baseline["momentum"] else ""
    return config["method"] + momentum + steps
