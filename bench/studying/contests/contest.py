"""Methods beside each other, each at the learning rate that suits it best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.defects import sort_key
from ..inference import Comparison, against
from ..methods import METHODS
from ..models import MODELS
from ..question import Config, Finished, without
from .tuning import Outcome, Scores, best_of, climb, maxima, refine, search

# Keys to sort entries of configurations by; others are ascending.
SORT_KEYS: dict[str, Callable[[Any], Any]] = {"labels": sort_key, "model": list(MODELS).index}


@dataclass(frozen=True)
class SearchResult:
    """What a search for the best rate of a method has found.

    Attributes:
        runs: those that it needs so far, finished or not.
        best: the best rate, or None before it is known.
        largest: the largest rate that trains, where the search has gone so far up, and None where none trains.
    """

    runs: list[Config]
    best: float | None = None
    largest: float | None = None


@dataclass(frozen=True)
class Contest:
    """How the rate of a method is chosen, and with which seeds the method is run at that rate.

    Attributes:
        first_rates: of a configuration without `lr` and `seed`, the rates that its search begins with.
        scores: of an outcome; the search takes the rate with the largest mean of the first one, then of the next.
        in_search: entries in which the runs of the search differ from those that count.
        fails: whether an outcome is that of a training that failed. With it, the search goes on from its best rate
            upwards until a training fails, and takes the best of all these rates.
        search_seeds: of the search; those of the runs that count have to be others.
    """

    first_rates: Callable[[Config], Sequence[float]]
    scores: Scores
    in_search: Config = field(default_factory=dict)
    fails: Callable[[Outcome], bool] | None = None
    search_seeds: Sequence[int] = (100, 101)

    def search(self, finished: Finished, base: Config) -> SearchResult:
        """The search for a configuration without `lr` and `seed`."""
        searching = base | self.in_search
        on_grid, best = search(finished, searching, self.first_rates(base), self.search_seeds, self.scores)
        if best is None:
            return SearchResult(on_grid)
        grid = sorted({run["lr"] for run in on_grid})
        peaks = maxima(finished, searching, grid, self.search_seeds, self.scores)
        nearby, best = refine(finished, searching, peaks, self.search_seeds, self.scores)
        if best is None or self.fails is None:
            return SearchResult(on_grid + nearby, best)
        tried = [run["lr"] for run in on_grid + nearby]
        upwards, trained = climb(finished, searching, best, tried, self.search_seeds, self.fails)
        if trained is None:
            return SearchResult(on_grid + nearby + upwards)
        _, best = best_of(finished, searching, [best, *trained], self.search_seeds, self.scores)
        return SearchResult(on_grid + nearby + upwards, best, trained[-1] if trained else None)

    def plan(self, finished: Finished, base: Config, seeds: Iterable[int]) -> list[Config]:
        """The runs of the search, and then those that count."""
        found = self.search(finished, base)
        return found.runs + ([] if found.best is None else [base | {"lr": found.best, "seed": seed} for seed in seeds])

    def entries(self, finished: Finished) -> list[Entry]:
        """All methods whose runs that count are finished.

        Those of which some seeds are still missing are left out, and so are runs at another rate than the best one,
        which an earlier search may have found. As long as methods are missing, the correction for their number is
        too small.
        """
        counted: dict[tuple[tuple[str, Any], ...], dict[int, dict[str, Any]]] = {}
        for line in finished:
            seed = line.config["seed"]
            if seed not in self.search_seeds:
                config = tuple(without(line.config, "seed").items())
                counted.setdefault(config, {})[seed] = line.outcome
        seeds = max((sorted(outcomes) for outcomes in counted.values()), key=len, default=[])
        return [
            Entry(dict(config), [outcomes[seed] for seed in seeds])
            for config, outcomes in counted.items()
            if sorted(outcomes) == seeds and self._is_best(finished, dict(config))
        ]

    def _is_best(self, finished: Finished, config: Config) -> bool:
        """Whether the configuration, without its seed, has the best rate."""
        return self.search(finished, without(config, "lr")).best == config["lr"]


@dataclass(frozen=True, eq=False)
class Entry:
    """A method at its best rate.

    Attributes:
        config: of its runs, without the seed.
        outcomes: in the order of the seeds, which are the same for all methods.
    """

    config: Config
    outcomes: Sequence[dict[str, Any]]

    def values(self, name: str) -> list[Any]:
        """An entry of the outcomes, by seed."""
        return [outcome[name] for outcome in self.outcomes]

    def percent(self, name: str) -> list[float]:
        """A share among the outcomes, by seed, in percent."""
        return [100 * value for value in self.values(name)]


class Group(dict[str, Entry]):
    """Methods that are compared with each other, by name, in the order of the catalogue.

    The first one is the baseline, SGD. Names tell what else differs from it.
    """

    def __init__(self, baseline: Entry, entries: Iterable[Entry]) -> None:
        order = list(METHODS)
        super().__init__({baseline.config["method"]: baseline})
        for entry in sorted(entries, key=lambda each: (each.config["steps"], order.index(each.config["method"]))):
            if entry is not baseline:
                self[_name(entry.config, baseline.config)] = entry

    @property
    def baseline(self) -> Entry:
        return next(iter(self.values()))

    def compared(self, values: Callable[[Entry], Sequence[float]]) -> dict[str, Comparison]:
        """What `values` gives of each other method, by seed, less that of the baseline; by method."""
        others = {name: values(entry) for name, entry in self.items() if entry is not self.baseline}
        return against(values(self.baseline), others)


def grouped(entries: Iterable[Entry], *by: str) -> dict[tuple[Any, ...], Group]:
    """The entries by what their configurations have under these names; groups without a baseline are left out."""
    found: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        found.setdefault(tuple(entry.config[name] for name in by), []).append(entry)
    baselines = {key: _baseline(group) for key, group in found.items()}
    in_order = sorted(baselines.items(), key=lambda item: _sort_key(by, item[0]))
    return {key: Group(baseline, found[key]) for key, baseline in in_order if baseline}


def _sort_key(names: Sequence[str], values: Sequence[Any]) -> list[Any]:
    """By which entries of a configuration are ascending, unless they have an order of their own."""
    return [SORT_KEYS[name](value) if name in SORT_KEYS else value for name, value in zip(names, values, strict=True)]


def _baseline(entries: Sequence[Entry]) -> Entry | None:
    """SGD with the fewest steps and the largest momentum of all, or None if it is not among them."""
    steps, momentum = min(each.config["steps"] for each in entries), max(each.config["momentum"] for each in entries)
    wanted = {"method": "SGD", "steps": steps, "momentum": momentum}
    return next((each for each in entries if wanted.items() <= each.config.items()), None)


def _name(config: Config, baseline: Config) -> str:
    steps = f", {config['steps'] // baseline['steps']} x the steps" if config["steps"] > baseline["steps"] else ""
    momentum = ", no momentum" if config["momentum"] < baseline["momentum"] else ""
    return config["method"] + momentum + steps
