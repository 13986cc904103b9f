"""Rules, which choose the weights w_i of the direction sum_i w_i g_i from the statistics of a batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .arguments import EigenvalueMethod, Need, checked_need, is_of_torchjd
from .stats import Statistics, chosen_by

# What may be passed for weights: Statistics -> (B,).
Weights: TypeAlias = Callable[[Statistics], Tensor]
# What a rule remembers from batch to batch.
State: TypeAlias = dict[str, Any]


class Rule(ABC):
    """A rule that chooses a weight for each sample.

    Attributes:
        is_mean: whether the direction is always the mean gradient, so that one read of the gradients may give both it
            and the statistics.
        eigenvalue_method: if lambda_max is all that it reads of the Gramian, how several processes find that of all
            their samples.
        only_sample_norms: whether `sample_norms` are all that it reads of the Gramian, so that several processes send
            these alone.
        is_additive: whether the directions of batches are known to add up to that of their union.
    """

    is_mean = False
    is_additive = False
    eigenvalue_method: EigenvalueMethod | None = None
    only_sample_norms = False

    @property
    @abstractmethod
    def needs(self) -> Need:
        """What it reads of the statistics of the next batch: "gram", or "norms" or "alignments" without the Gramian."""

    @abstractmethod
    def choose(self, stats: Statistics) -> tuple[Tensor, Tensor | None]:
        """The weights, (B,), and the epsilon that they come from, or None if they come from none."""

    @abstractmethod
    def rehearsal(self) -> Rule:
        """A rule that needs the same as this one in the next batch, and calls no function of the user's."""

    def state_dict(self) -> State:
        """What the choices in later batches depend on besides their statistics; empty by default."""
        return {}

    def load_state_dict(self, state: State) -> None:  # noqa: B027
        """Go on from where `state_dict` was called; an empty state begins anew. By default there is nothing to load."""


class EqualWeights(Rule):
    """w_i = 1/B.

    Args:
        needs: which statistics to compute.
    """

    def __init__(self, needs: Need) -> None:
        self._needs = needs

    @property
    def needs(self) -> Need:
        """The argument."""
        return self._needs

    def choose(self, stats: Statistics) -> tuple[Tensor, None]:
        """1/B for each sample."""
        return torch.full_like(stats.alignments, 1 / stats.batch_size), None

    def rehearsal(self) -> Rule:
        """The rule itself."""
        return self


class Observation(EqualWeights):
    """The mean gradient, for the sake of the statistics."""

    is_mean = True
    is_additive = True

    def __repr__(self) -> str:
        return "plain gradients"


class UserRule(Rule):
    """A callable Statistics -> (B,) as a rule. It needs the Gramian unless its attribute `needs` says otherwise.

    Args:
        function: the callable.

    Raises:
        TypeError: if `function` is not one, or takes a Gramian, as weightings of TorchJD do.
        ValueError: if its attribute `needs` is not one of `NEEDS`.
    """

    def __init__(self, function: Weights) -> None:
        if not callable(function) or isinstance(function, type):
            raise TypeError(
                f"weights is {function!r}: pass a callable Statistics -> (B,), such as"
                " rgd_ext.weights.Clip(1.0) or lambda stats: torch.full_like(stats.alignments, 1 / stats.batch_size)"
            )
        if is_of_torchjd(function, "Weighting"):
            raise TypeError(
                f"weights is {function!r}, which takes a Gramian: wrap it, rgd_ext.weights.FromGramian(...)"
            )
        self._function = function
        self.only_sample_norms = bool(getattr(function, "only_sample_norms", False))
        checked_need(function)

    def __repr__(self) -> str:
        return f"weights={self._function!r}"

    @property
    def needs(self) -> Need:
        """What the callable says that it needs now."""
        return checked_need(self._function)

    def choose(self, stats: Statistics) -> tuple[Tensor, None]:
        """What the callable returns, checked; NaN without a call where gradients on the CPU are not finite.

        Then the direction is not finite either, as a gradient scaler expects it. On a GPU the host would wait.
        """
        if stats.alignments.is_cpu and not stats.grad_norm.isfinite():
            return torch.full_like(stats.alignments, math.nan), None
        return self._checked(chosen_by(self._function, stats), stats), None

    def rehearsal(self) -> Rule:
        """Equal weights, with the statistics that the callable needs."""
        return EqualWeights(self.needs)

    def _checked(self, weights: object, stats: Statistics) -> Tensor:
        """`weights` like the statistics, or an error that says what is wrong with them."""
        shape = tuple(stats.alignments.shape)
        if not isinstance(weights, Tensor):
            raise TypeError(
                f"the rule {self._function!r} returned a {type(weights).__name__}: return a tensor of shape {shape}"
            )
        if weights.shape != shape:
            raise ValueError(
                f"the rule {self._function!r} returned weights of shape {tuple(weights.shape)} for"
                f" {stats.batch_size} samples: return one weight for each sample, of shape {shape}"
            )
        if weights.is_complex():
            raise TypeError(f"the rule {self._function!r} returned weights of {weights.dtype}: return real numbers")
        if weights.layout != torch.strided or weights.is_quantized or weights.is_meta != stats.alignments.is_meta:
            raise TypeError(
                f"the rule {self._function!r} returned a tensor that is not dense, or without numbers:"
                f" return an ordinary tensor on {stats.alignments.device}"
            )
        # A copy: the rule may write in its own tensor later.
        found = weights.detach().to(stats.alignments, copy=True)
        # On a GPU the host would wait for the answer.
        if found.is_cpu and not found.isfinite().all():
            raise ValueError(
                f"the rule {self._function!r} returned the weight {found[~found.isfinite()][0]}: return finite numbers;"
                " torch.where(weights.isfinite(), weights, 0) replaces others"
            )
        return found
