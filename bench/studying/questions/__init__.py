"""The questions of the study, a file for each."""

from __future__ import annotations

from importlib import import_module

from ..question import Question

NAMES = ("follow", "curvature", "labels", "imbalance", "batches", "stability", "descent", "noise", "sampling", "times")


def load(name: str) -> Question:
    """The question of that name. It is imported now, since questions need SciPy and other benchmarks do not."""
    return import_module(f".{name}", __package__).QUESTION


def load_all() -> dict[str, Question]:
    """All of them, by name."""
    return {name: load(name) for name in NAMES}
