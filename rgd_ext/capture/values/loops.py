"""What torch.func.vmap runs for one sample after the other: torch names an operator, and we name who runs it."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .samples import fallback_warnings

_MESSAGE = "There is a performance drop because we have not yet implemented the batching rule for"
_of_models: weakref.WeakKeyDictionary[nn.Module, Loops] = weakref.WeakKeyDictionary()


def loops_of(model: nn.Module | None) -> Loops:
    """What is known of `model`, which is captured."""
    return Loops() if model is None else _of_models.setdefault(model, Loops())


class Loops:
    """The operators that run for one sample after the other in a captured model."""

    def __init__(self) -> None:
        # The operators by the name of who runs them, and those who were named in a warning.
        self._operators: dict[str, list[str]] = {}
        self._named: set[str] = set()
        self._is_silent = False

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nobody is named inside, in calls that the user did not make; the warning is given in a later call."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False

    @contextmanager
    def noted(self, who: str) -> Iterator[None]:
        """Name `who` in a warning, once, if torch.func.vmap loops inside; torch's own warning is left out."""
        if who in self._operators:
            with fallback_warnings(not self._operators[who]):
                yield
        else:
            operators: list[str] = []
            with _noting(operators):
                yield
            self._operators[who] = operators
        if self._operators[who] and not self._is_silent and who not in self._named:
            self._named.add(who)
            warnings.warn(
                f"{who} is slow: torch.func.vmap runs {', '.join(self._operators[who])} for one sample after the"
                " other. Leave it to a module that has a rule, compute it by other operators, or teach the capture the"
                " gradient of the module with rgd_ext.register_rule",
                stacklevel=2,
            )


@contextmanager
def _noting(operators: list[str]) -> Iterator[None]:
    """Add the operators to the list that torch warns of inside; other warnings are given afterwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", _MESSAGE)
        yield
    for warning in caught:
        found = re.match(rf"{_MESSAGE} (\w+::\w+)", str(warning.message))
        if found is None:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif found[1] not in operators:
            operators.append(found[1])
