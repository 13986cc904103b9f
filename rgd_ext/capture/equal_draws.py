"""Random numbers that do not depend on how many are drawn, so that a sample alone meets those it meets in a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

# What each random number of these operators is: dropout keeps everything, noise is the same everywhere.
_CONSTANT = {
    "bernoulli": 1,
    "bernoulli_": 1,
    "rand": 0.3,  # what happens with a probability of a half happens
    "rand_like": 0.3,
    "randn": 0.5,
    "randn_like": 0.5,
    "normal_": 0.5,
    "uniform_": 0.5,
    "exponential_": 0.5,
    "cauchy_": 0.5,
    "log_normal_": 0.5,
    "geometric_": 1,
}


def _reversed(result: Tensor, n: int, *_, **__) -> Tensor:
    # A shuffle that leaves samples where they are would hide that it mixes them.
    return result.copy_(torch.arange(n - 1, -1, -1, device=result.device))


def _likeliest(result: Tensor, probabilities: Tensor, number: int, *_, **__) -> Tensor:
    if number <= probabilities.shape[-1]:
        return result.copy_(probabilities.topk(number).indices)
    return result.copy_(probabilities.argmax(-1, keepdim=True).expand_as(result))


def _dropout(result: tuple[Tensor, Tensor], x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    # As its derivative has it, x times the mask times the scale.
    return x / (1 - p) if train in (True, None) and p < 1 else x.clone(), torch.ones_like(result[1])


def _leaky(result: Tensor, x: Tensor, noise: Tensor, lower: float, upper: float, training: bool, *_, **__) -> Tensor:
    if not training:
        return result
    x = result / noise  # which may have been overwritten
    noise.copy_(torch.where(x > 0, 1.0, (lower + upper) / 2))
    return result.copy_(x * noise)


# (result, *args, **kwargs) -> what takes its place.
_RULES: dict[str, Callable] = {
    "randint": lambda result, low, high, *_, **__: result.fill_(low if isinstance(high, int) else 0),
    "randint_like": lambda result, _, low, high=None, **__: result.fill_(0 if high is None else low),
    "random_": lambda result, _, *limits, **__: result.fill_(limits[0] if len(limits) == 2 else 0),
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


class EqualDraws(TorchDispatchMode):
    """Random operators give numbers that are the same for every sample, whatever the batch.

    Attributes:
        unknown: the operators that drew numbers of their own all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _CONSTANT:
            return func(*args, **kwargs).fill_(_CONSTANT[name])
        if name in _RULES:
            return _RULES[name](func(*args, **kwargs), *args, **kwargs)
        before = _states()
        result = func(*args, **kwargs)
        if any(not torch.equal(a, b) for a, b in zip(before, _states(), strict=True)):
            self.unknown.add(name)
        return result


class LowestPrecision(TorchDispatchMode):
    """Notes the coarsest dtype of real numbers that operators give.

    Attributes:
        dtype: that dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            is_real = isinstance(x, Tensor) and x.dtype.is_floating_point
            if is_real and torch.finfo(x.dtype).eps > torch.finfo(self.dtype).eps:
                self.dtype = x.dtype
        return result


def unknown_draws() -> set[str]:
    """Random operators that still depended on the batch, if `EqualDraws` is at work."""
    mode = _get_current_dispatch_mode()
    return mode.unknown if isinstance(mode, EqualDraws) else set()


def _states() -> list[Tensor]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
