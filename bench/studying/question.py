"""What a question of the study is made of: a plan of runs, the run of one configuration, and the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, KeysView, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Sources

# Numbers, strings and booleans by name. They determine what a run computes, to the last bit on one machine.
Config = dict[str, Any]


def key_of(config: Config) -> str:
    """One text for each configuration, whatever the order of its entries."""
    return json.dumps(config, sort_keys=True, allow_nan=False)


@dataclass(frozen=True)
class Line:
    """A finished run.

    Attributes:
        config: what was run.
        outcome: what it gave: numbers, and curves as lists of them; None stands for a number that is not finite.
        seconds: how long it took, beside whatever else the machine did.
        machine: hardware, torch and commit.
    """

    config: Config
    outcome: dict[str, Any]
    seconds: float
    machine: dict[str, Any]


class Finished:
    """The runs that are finished, by their configurations."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}

    def add(self, line: Line) -> None:
        self._lines[key_of(line.config)] = line

    def __contains__(self, config: Config) -> bool:
        return key_of(config) in self._lines

    def __getitem__(self, config: Config) -> Line:
        return self._lines[key_of(config)]

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines.values())

    def __len__(self) -> int:
        return len(self._lines)

    def keys(self) -> KeysView[str]:
        """`key_of` the configurations, as a set."""
        return self._lines.keys()

    def grouped(self, *names: str) -> dict[tuple[Any, ...], list[Line]]:
        """The lines by what their configurations have under these names, in the order of the first line of each."""
        groups: dict[tuple[Any, ...], list[Line]] = {}
        for line in self:
            groups.setdefault(tuple(line.config[name] for name in names), []).append(line)
        return groups


@dataclass(frozen=True)
class Scope:
    """How much is to be run: small sizes if `quick`, and only on the data that are there, by name."""

    quick: bool
    data: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells as text, for a terminal and for Markdown."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Answer:
    """What the runs of a question say.

    Attributes:
        tables: by name.
        figures: by name, functions that draw on an empty figure of matplotlib of 10 inches by their second entry.
        numbers: by name, as the text of the page shows them.
    """

    tables: dict[str, Table]
    figures: dict[str, tuple[Callable[[Any], None], float]] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)


def without(config: Config, name: str) -> Config:
    """The configuration without one of its entries."""
    return {other: value for other, value in config.items() if other != name}


def slug(*parts: object) -> str:
    """A name for a number of the page, such as digits.mlp.symmetric_0_4; a minus becomes a word."""
    texts = (str(part).lower().replace("(-", "(minus ") for part in parts)
    words = ("".join(letter if letter.isalnum() else " " for letter in text).split() for text in texts)
    return ".".join("_".join(each) for each in words)


@dataclass(frozen=True)
class Question:
    """A question of the study.

    Attributes:
        title: the question in words.
        plan: the runs that are wanted now, given those that are finished, which it may repeat. It is asked again until
            all that it names are finished, so that later ones may depend on earlier ones.
        run: the outcome of one configuration, which is all that it depends on.
        answer: tables, figures and numbers of the finished runs.
        alone: whether no run of another process, of whatever question, may be going on during one of these.
    """

    title: str
    plan: Callable[[Finished, Scope], list[Config]]
    run: Callable[[Config, Sources], dict[str, Any]]
    answer: Callable[[Finished], Answer]
    alone: bool = False
