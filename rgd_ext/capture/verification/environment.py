"""The modes that forwards and backwards of a proof run in, and the random numbers that they draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

from ...nests import modules_in
from ..equal_draws import EqualDraws
from ..modes import uncompiled
from .random_numbers import RandomNumbers


class Environment:
    """Random numbers and precision of the forwards and backwards of a proof.

    Random numbers are the same for all samples where a layer of the module drops values out. Without such a layer this
    begins when a forward has drawn random numbers, and that forward has to run again.

    Args:
        module: the module that is called.
        random_numbers: the generators that its forward may draw from.
        autocasts: the kinds of devices for which autocast is enabled and left out.
        side: the end of their range that uniform random numbers are near, see `EqualDraws`.
    """

    def __init__(self, module: nn.Module, random_numbers: RandomNumbers, autocasts: Sequence[str], side: int) -> None:
        self._random_numbers, self._autocasts, self._side = random_numbers, autocasts, side
        drops = any(isinstance(m, _DropoutNd) and m.training and m.p for m in modules_in(module))
        self._equal_draws = EqualDraws(side) if drops else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """What runs inside is in these modes."""
        with ExitStack() as stack:
            for kind in self._autocasts:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if self._equal_draws is not None:
                stack.enter_context(uncompiled())
                stack.enter_context(self._equal_draws)
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the other kernels draw their masks inside
            yield

    def rewind(self) -> None:
        """The next forward draws the numbers again that the first one drew."""
        self._random_numbers.rewind()

    def equalise_draws(self) -> bool:
        """Make random numbers the same for all samples if the forward before has drawn others; returns whether."""
        if self._equal_draws is None and self._random_numbers.have_drawn():
            self._equal_draws = EqualDraws(self._side)
            return True
        return False

    def draws_elsewhere(self) -> bool:
        """Whether the forward before drew random numbers from another library."""
        return self._random_numbers.have_others_drawn()

    @property
    def lacks_autocast(self) -> bool:
        """Whether autocast is enabled and left out."""
        return bool(self._autocasts)

    @property
    def is_equalising(self) -> bool:
        """Whether random numbers are the same for all samples."""
        return self._equal_draws is not None

    @property
    def has_other_side(self) -> bool:
        """Whether uniform random numbers were near one end of their range, so that a proof at the other may follow."""
        return self._side == 0 and self._equal_draws is not None and self._equal_draws.has_sides

    @property
    def unknown_draws(self) -> set[str]:
        """The operators whose random numbers still depend on the batch."""
        return set() if self._equal_draws is None else self._equal_draws.unknown
