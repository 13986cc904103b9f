"""What a package gives for a problem, and the ways to use a package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..problem import Problem


class AbsentError(Exception):
    """The package has no such thing."""


@dataclass(frozen=True)
class Found:
    """The results of one way to use a package.

    Attributes:
        results: by kind: "gradients" of the samples, (B, d), their "Gramian", (B, B), the "direction" of RGD, (d,), and
            the product of the "empirical Fisher" with `problem.probes`, (d, PROBES).
        model: what the user calls from now on.
        instead: the model that the package replaces the given one with, before it touches that.
    """

    results: dict[str, Tensor]
    model: nn.Module
    instead: nn.Module | None = None


@dataclass(frozen=True)
class Package:
    """A package.

    Attributes:
        distribution: its name in a package index, for the version.
        gives: what is compared.
        ways: by name; the first one is what its documentation begins with.
    """

    distribution: str
    gives: str
    ways: dict[str, Callable[[Problem], Found]]
