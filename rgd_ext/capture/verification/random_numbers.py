"""The random number generators that a forward may draw from, whose states are noted and put back."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterable

import torch
from torch import Tensor


class RandomNumbers:
    """The states of the random number generators that a forward may draw from.

    Args:
        devices: the CUDA devices whose generators these are.
        own: the generators of the model and its arguments, of torch, Python or NumPy.
    """

    def __init__(self, devices: Iterable[torch.device], own: Iterable[object]) -> None:
        own = list({id(generator): generator for generator in own}.values())
        self._devices, self._own = list(devices), [each for each in own if isinstance(each, torch.Generator)]
        self._states = self._of_torch()
        numpy = sys.modules.get("numpy")
        self._others = [random, *([] if numpy is None else [numpy.random])]
        self._others += [each for each in own if not isinstance(each, torch.Generator)]
        self._other_states = [_state_of(each) for each in self._others]

    def _of_torch(self) -> list[Tensor]:
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
        return states + [generator.get_state() for generator in self._own]

    def have_drawn(self) -> bool:
        """Whether a generator of torch's has been used since the states were noted."""
        return any(not torch.equal(a, b) for a, b in zip(self._states, self._of_torch(), strict=True))

    def have_others_drawn(self) -> bool:
        """Whether one of Python's or NumPy's has been used since; the numbers it gives may depend on the batch."""
        return any(_state_of(each) != state for each, state in zip(self._others, self._other_states, strict=True))

    def rewind(self) -> None:
        """Put the states back, so that the same numbers are drawn again."""
        cpu, *others = self._states
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, others, strict=False):
            torch.cuda.set_rng_state(state, device)
        for generator, state in zip(self._own, others[len(self._devices) :], strict=True):
            generator.set_state(state)
        for each, state in zip(self._others, self._other_states, strict=True):
            _set_state(each, state)


def is_generator(x: object) -> bool:
    """Whether `x` is a random number generator of torch, Python or NumPy."""
    numpy = sys.modules.get("numpy")
    of_numpy = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return isinstance(x, (torch.Generator, random.Random, *of_numpy))


def _state_of(generator: object) -> tuple | bytes:
    """The state of a generator of Python's or NumPy's, or of their modules, in a form that `==` compares."""
    if hasattr(generator, "getstate"):
        return generator.getstate()
    return pickle.dumps(generator.get_state() if hasattr(generator, "get_state") else generator.bit_generator.state)


def _set_state(generator: object, state: tuple | bytes) -> None:
    if hasattr(generator, "setstate"):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(pickle.loads(state))
    else:
        generator.bit_generator.state = pickle.loads(state)
