"""Policies, which choose epsilon from the statistics of a batch.

To add a named policy, write a frozen dataclass here that inherits from `Policy`, and list it in `POLICIES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .arguments import (
    EIGENVALUE_METHODS,
    EigenvalueMethod,
    LossScale,
    Need,
    check_finite,
    check_scale,
    checked_need,
    current_scale,
)
from .inverses import INVERSES, Inverse
from .stats import Statistics, chosen_by


class Policy(ABC):
    """What chooses epsilon for each batch.

    Attributes:
        needs: "gram" if the policy reads the Gramian, or `largest_eigenvalue`, `eigenvalues` or `rank`, which come from
            it and may be None without it; else "alignments" or "norms".
        every: a captured model computes the Gramian in every so many backwards, and estimates lambda_max in the others.
    """

    needs: Need = "gram"
    every: int = 1

    def check(self, inverse: Inverse) -> None:  # noqa: B027
        """Raise ValueError if the policy does not suit `inverse`. By default it suits both."""

    @abstractmethod
    def __call__(self, stats: Statistics) -> float | Tensor:
        """Epsilon, a number or a scalar tensor."""


# What may be passed for epsilon: a number stands for `Fixed`.
Epsilon: TypeAlias = Policy | Callable[[Statistics], float | Tensor] | float


@dataclass(frozen=True)
class Fixed(Policy):
    """A constant epsilon. It is not checked against eq. (6), and has to be chosen anew for another loss.

    Args:
        value: epsilon for the loss before it is scaled.
        loss_scale: what the loss is multiplied by before its backward, or a function that returns it:
            `loss_scale=scaler.get_scale` with a `torch.amp.GradScaler`. D grows with its square, so the epsilon of the
            scaled loss, which is in `Stats`, is value / loss_scale^2.

    Raises:
        ValueError: if `value` is not finite, or `loss_scale` not positive (a function is called in every backward).
        TypeError: if `value` or `loss_scale` is not a number.
    """

    value: float
    loss_scale: LossScale = 1.0
    needs = "alignments"

    def __post_init__(self) -> None:
        check_finite("Fixed", "value", self.value)
        check_scale("Fixed", self.loss_scale)

    def __call__(self, stats: Statistics) -> float:
        """value / loss_scale^2."""
        return self.value / current_scale("Fixed", self.loss_scale) ** 2


@dataclass(frozen=True)
class Ascent(Policy):
    """epsilon = -rho / |g|: from one backward, an estimate of the gradient at x + rho g / |g|.

    That is the point of steepest ascent within a distance of rho, at which sharpness-aware minimisation (P. Foret et
    al., 2021, arXiv 2010.01412) takes its gradient by a second backward. To first order in rho it is
    grad f(x + rho g / |g|) = g + (rho / |g|) H g, with H the Hessian of the mean loss. Where the losses of the samples
    are negative log-likelihoods and the labels are distributed as the model predicts them, H is on average the Fisher
    matrix, and mean_i g_i g_i^T = D + g g^T, the empirical Fisher matrix, is an estimate of it (F. Kunstner et al.,
    2019, arXiv 1905.12558). With D in the place of H, up to g g^T, which is small near a minimum and only lengthens the
    direction, it is (I + (rho / |g|) D) g = (I - eps D) g.

    It is a poor estimate where these assumptions fail: far from a fit; with wrong labels; where the model interpolates
    its training data, since g_i g_i^T then falls faster than H; for losses that are no likelihoods or have another
    scale (D grows with its square, H with the scale itself); and for a large rho.

    I - eps D = I + |eps| D is positive definite for any rho, so the direction is one of descent, and eq. (6), which
    bounds positive epsilons, sets no bound. I + eps D is a metric only for |eps| < 1 / lambda_max(D); beyond that the
    direction is just g + (rho / |g|) D g.

    Args:
        rho: the distance, in units of the parameters.
        loss_scale: what the mean loss is multiplied by before its backward, as for `Fixed`: epsilon is then
            -rho / (loss_scale |g|), with the g of the scaled loss. For the sum of the losses pass the batch size.

    Raises:
        ValueError: if `rho` is not finite or is negative, `loss_scale` is not positive (a function is called in every
            backward), or with the exact inverse, whose metric I - (rho / |g|) D may be singular.
        TypeError: if `rho` or `loss_scale` is not a number.
    """

    rho: float
    loss_scale: LossScale = 1.0
    needs = "alignments"

    def __post_init__(self) -> None:
        check_finite("Ascent", "rho", self.rho)
        if self.rho < 0:
            raise ValueError(f"Ascent(rho={self.rho}): pass the distance to ascend, a number of at least 0")
        check_scale("Ascent", self.loss_scale)

    def check(self, inverse: Inverse) -> None:
        """Raise ValueError for the exact inverse."""
        if inverse == "exact":
            raise ValueError(
                f"Ascent(rho={self.rho}) with inverse='exact': I + eps D may be singular for its negative epsilon; use"
                " inverse='weak-field', whose I - eps D is the step of the ascent"
            )

    def __call__(self, stats: Statistics) -> Tensor:
        """-rho / (loss_scale |g|); 0 where g = 0."""
        norm = stats.grad_norm
        epsilon = -self.rho / (current_scale("Ascent", self.loss_scale) * norm)
        return epsilon.masked_fill(norm == 0, 0.0)


@dataclass(frozen=True)
class _Fraction(Policy):
    """A policy whose epsilon is a fraction of a quantity that follows the scale of the loss."""

    fraction: float = 0.5

    def __post_init__(self) -> None:
        check_finite(type(self).__name__, "fraction", self.fraction)


@dataclass(frozen=True)
class Spectral(_Fraction):
    """epsilon = fraction / lambda_max(D), eq. (6); needs the Gramian.

    A positive fraction takes weight from the samples whose gradients agree with the mean; a negative one gives it to
    them.

    Args:
        fraction: epsilon as a fraction of the bound 1 / lambda_max(D) in eq. (6).
        every: a captured model computes the Gramian and lambda_max in every so many backwards only. In between
            lambda_max is taken to be the same share of tr D as in the last of them, which follows the scale of the loss
            and of D; only then can epsilon exceed eq. (6), by as much as that share grows. `rgd_ext.direction` always
            computes it.
        across_ranks: for a batch over several processes (`process_group`), how lambda_max of the whole batch is found:
            "lanczos", the default, iterates to the value of one process, with an exchange of a gradient in each of up
            to some thirty steps; "bound" adds up the lambda_max of the processes and the norms of the differences of
            their means, which costs a number from each process, keeps eq. (6) and makes epsilon smaller.

    Raises:
        ValueError: if `fraction` is not finite, is <= -1 (the metric would be singular), or is >= 1 with the
            weak-field inverse (which would be singular or reverse a direction); if `every` is not positive, or is more
            than 1 with the exact inverse, which needs the Gramian itself; for another `across_ranks`.
        TypeError: if `every` is not a whole number.
    """

    every: int = 1
    across_ranks: EigenvalueMethod = "lanczos"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.every, int) or isinstance(self.every, bool):
            raise TypeError(f"Spectral(every={self.every!r}): pass a whole number of backwards")
        if self.every < 1:
            raise ValueError(f"Spectral(every={self.every}): pass at least 1")
        if self.across_ranks not in EIGENVALUE_METHODS:
            names = " or ".join(map(repr, EIGENVALUE_METHODS))
            raise ValueError(f"Spectral(across_ranks={self.across_ranks!r}): choose {names}")

    def check(self, inverse: Inverse) -> None:
        """Raise ValueError if `inverse` allows no such fraction, or needs the Gramian in every backward."""
        _check_fraction("Spectral", self.fraction, inverse)
        if self.every > 1 and inverse == "exact":
            raise ValueError(
                f"Spectral(every={self.every}) with inverse='exact': that inverse needs the Gramian in every backward;"
                " use every=1, or inverse='weak-field'"
            )

    def __call__(self, stats: Statistics) -> Tensor:
        """fraction / lambda_max."""
        return self.fraction / stats.largest_eigenvalue  # type: ignore[operator, return-value]  # see `needs`


@dataclass(frozen=True)
class Trace(_Fraction):
    """epsilon = fraction / tr D, which needs no Gramian and is within eq. (6) because lambda_max <= tr D.

    Raises:
        ValueError: as `Spectral`.
    """

    needs = "norms"

    def check(self, inverse: Inverse) -> None:
        """Raise ValueError if `inverse` allows no such fraction."""
        _check_fraction("Trace", self.fraction, inverse)

    def __call__(self, stats: Statistics) -> Tensor:
        """fraction / tr D."""
        return self.fraction / stats.trace


@dataclass(frozen=True)
class Rayleigh(_Fraction):
    """epsilon = fraction |g|^2 / (g^T D g), so that the direction is one of descent for fraction < 1.

    Then <g, (I - eps D) g> = (1 - fraction) |g|^2 for g and D of the batch; with a small batch and a fraction near 1, a
    step may raise the loss of all samples. Epsilon may exceed the bound of eq. (6), since the Rayleigh quotient of g is
    at most lambda_max.

    Raises:
        ValueError: if `fraction` is not finite.
    """

    needs = "alignments"

    def __call__(self, stats: Statistics) -> Tensor:
        """fraction |g|^2 / (g^T D g)."""
        form, squared = stats.alignments.square().mean(), stats.squared_grad_norm  # g^T D g, |g|^2
        # Where g is orthogonal to the range of D, D g = 0 and any epsilon gives the plain gradient; but rounding may
        # leave a form of up to ulp^2 |g|^2 mean_i |g_i|^2, by which nothing may be divided.
        excess = torch.addcmul(form, squared, squared + stats.trace, value=-(stats.ulp**2))
        return (self.fraction * squared / form).masked_fill(excess <= 0, 0.0)


# All named policies, and those of them whose epsilon follows the scale of the loss.
POLICIES: tuple[type[Policy], ...] = (Fixed, Spectral, Trace, Rayleigh, Ascent)
SCALE_FREE_POLICIES = tuple(policy for policy in POLICIES if issubclass(policy, _Fraction))


class _FromCallable(Policy):
    """A user's callable as a policy. It needs the Gramian unless its attribute `needs` says otherwise."""

    def __init__(self, function: Callable[[Statistics], float | Tensor]) -> None:
        self._function = function
        checked_need(function)

    @property
    def needs(self) -> Need:  # type: ignore[override]  # a callable may change it
        return checked_need(self._function)

    def __call__(self, stats: Statistics) -> float | Tensor:
        return self._function(stats)

    def __repr__(self) -> str:
        return repr(self._function)


def checked_policy(epsilon: Epsilon, inverse: Inverse) -> Policy:
    """The policy that `epsilon` stands for, or an error that says what is wrong with the pair."""
    if inverse not in INVERSES:
        raise ValueError(f"inverse is {inverse!r}: choose {' or '.join(map(repr, INVERSES))}")
    if isinstance(epsilon, (int, float)):
        epsilon = Fixed(float(epsilon))
    if not callable(epsilon) or isinstance(epsilon, type):
        raise TypeError(
            f"epsilon is {epsilon!r}: pass a number, a policy like Spectral(0.5), or a callable Stats -> epsilon"
        )
    policy = epsilon if isinstance(epsilon, Policy) else _FromCallable(epsilon)
    policy.check(inverse)
    return policy


def chosen_epsilon(policy: Policy, statistics: Statistics) -> Tensor:
    """What `policy` chooses, checked, as a scalar tensor like the statistics."""
    epsilon, like = chosen_by(policy, statistics), statistics.alignments
    if not isinstance(epsilon, Tensor):
        if not isinstance(epsilon, (int, float)):
            raise TypeError(f"the policy {policy!r} returned {epsilon!r}: return a number or a scalar tensor")
        if not math.isfinite(epsilon) and statistics.grad_norm.isfinite():
            raise ValueError(f"the policy {policy!r} returned epsilon = {epsilon}: return a finite number")
        return like.new_full((), epsilon)  # made on the device: nothing to wait for
    if epsilon.numel() != 1:
        raise ValueError(f"the policy {policy!r} returned a tensor of shape {tuple(epsilon.shape)}: return a scalar")
    if epsilon.shape == () and epsilon.dtype == like.dtype and epsilon.device == like.device:
        return epsilon
    return epsilon.to(like).reshape(())


def _check_fraction(policy: str, fraction: float, inverse: Inverse) -> None:
    if inverse == "weak-field" and abs(fraction) >= 1:
        raise ValueError(
            f"{policy}(fraction={fraction}) with inverse='weak-field': |fraction| must be below 1, else"
            " eps >= 1/lambda_max breaks eq. (6); choose a smaller fraction or inverse='exact'"
        )
    if fraction <= -1:
        raise ValueError(
            f"{policy}(fraction={fraction}): I + eps D is singular for fraction <= -1; choose a larger one"
        )
