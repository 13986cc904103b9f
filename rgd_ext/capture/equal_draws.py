"""Random numbers that do not depend on how many are drawn, so that a sample alone meets those it meets in a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .modes import OperatorMode

# The constant that each of these operators gives: dropout keeps everything, noise is the same everywhere.
_CONSTANT = {
    "bernoulli": 1,
    "bernoulli_": 1,
    "randn": 0.5,
    "randn_like": 0.5,
    "normal_": 0.5,
    "exponential_": 0.5,
    "cauchy_": 0.5,
    "log_normal_": 0.5,
    "geometric_": 1,
}


def _reversed(result: Tensor, n: int, *_, **__) -> Tensor:
    # A permutation that leaves samples where they are would hide that it mixes them.
    return result.copy_(torch.arange(n - 1, -1, -1, device=result.device))


def _reorder_equals(indices: Tensor, x: Tensor, dim: int) -> None:
    # Shuffles are also made by sorting random numbers, which are all equal here.
    if x.ndim and x.shape[dim] > 1:
        are_equal = x.amax(dim, keepdim=True) == x.amin(dim, keepdim=True)
        indices.copy_(torch.where(are_equal, x.shape[dim] - 1 - indices, indices))


def _integer(result: Tensor, side: int, low: int, high: int) -> Tensor:
    return result.fill_(high - 1 if side else min(low + 1, high - 1))


def _likeliest(result: Tensor, probabilities: Tensor, number: int, *_, **__) -> Tensor:
    if number <= probabilities.shape[-1]:
        return result.copy_(probabilities.topk(number).indices)
    return result.copy_(probabilities.argmax(-1, keepdim=True).expand_as(result))


def _dropout(result: tuple[Tensor, Tensor], x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    # The derivative relies on the output being x times the mask times the scale.
    return x / (1 - p) if train in (True, None) and p < 1 else x.clone(), torch.ones_like(result[1])


def _leaky(result: Tensor, x: Tensor, noise: Tensor, lower: float, upper: float, training: bool, *_, **__) -> Tensor:
    if not training:
        return result
    x = result / noise  # which may have been overwritten
    noise.copy_(torch.where(x > 0, 1.0, (lower + upper) / 2))
    return result.copy_(x * noise)


# By the name of an operator: (its result, *args, **kwargs) -> the result that takes its place.
_RULES: dict[str, Callable] = {
    "randperm": _reversed,
    "multinomial": _likeliest,
    "native_dropout": _dropout,
    "rrelu_with_noise": _leaky,
    "rrelu_with_noise_": _leaky,
    "normal": lambda result, mean, std=1.0, *_, **__: result.copy_(mean + 0.5 * std),
    "poisson": lambda result, rate, *_, **__: result.copy_(rate.round()),
    "binomial": lambda result, count, p, *_, **__: result.copy_((count * p).round()),
    "_standard_gamma": lambda result, shape, *_, **__: result.copy_(shape),
    "_sample_dirichlet": lambda result, shape, *_, **__: result.copy_(shape / shape.sum(-1, keepdim=True)),
}

_ENDS = 0.01, 0.99
# Branches depend on uniform numbers, which are near either end of their range:
# (result, side, *args, **kwargs) -> the result that takes its place.
_SIDED: dict[str, Callable] = {
    "rand": lambda result, side, *_, **__: result.fill_(_ENDS[side]),
    "rand_like": lambda result, side, *_, **__: result.fill_(_ENDS[side]),
    "uniform_": lambda result, side, _, low=0.0, high=1.0, **__: result.fill_(low + (high - low) * _ENDS[side]),
    "randint": lambda result, side, first, second, *_, **__: _integer(
        result, side, *((first, second) if isinstance(second, int) else (0, first))
    ),
    "randint_like": lambda result, side, _, first, second=None, **__: _integer(
        result, side, *((0, first) if second is None else (first, second))
    ),
    "random_": lambda result, side, _, *limits, **__: _integer(result, side, *(0, 2, *limits)[-2:]),
}
# Operators that sort, and the place of their argument `dim` among those after the tensor.
_SORTS = {"sort": 0, "topk": 1}


class EqualDraws(OperatorMode):
    """A mode in which random operators give numbers that are the same for every sample, whatever the batch.

    Args:
        side: 0 for uniform numbers near the lower end of their range, or 1 for the upper end.

    Attributes:
        unknown: the operators that drew numbers of their own all the same.
        has_sides: whether uniform numbers were drawn.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.unknown: set[str] = set()
        self.has_sides = False
        self._side = side

    def operator(self, func: Any, args: tuple, kwargs: dict) -> object:
        name = func._schema.name.removeprefix("aten::")
        if name in _SORTS:
            result, (x, *others) = func(*args, **kwargs), args
            place = _SORTS[name]
            if not kwargs.get("stable") or (x == _ENDS[self._side]).all():
                _reorder_equals(result[1], x, others[place] if len(others) > place else kwargs.get("dim", -1))
            return result
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if name in _CONSTANT:
            return func(*args, **kwargs).fill_(_CONSTANT[name])
        if name in _SIDED:
            self.has_sides = True
            return _SIDED[name](func(*args, **kwargs), self._side, *args, **kwargs)
        if name in _RULES:
            return _RULES[name](func(*args, **kwargs), *args, **kwargs)
        before = _states()
        result = func(*args, **kwargs)
        if any(not torch.equal(a, b) for a, b in zip(before, _states(), strict=True)):
            self.unknown.add(name)
        return result


def unknown_draws() -> set[str]:
    """The random operators whose numbers still depend on the batch, if `EqualDraws` is active; otherwise none."""
    mode = _get_current_dispatch_mode()
    return mode.unknown if isinstance(mode, EqualDraws) else set()


def _states() -> list[Tensor]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
