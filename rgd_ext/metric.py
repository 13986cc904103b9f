"""The diffusion metric: statistics of per-sample gradients -> epsilon -> weights on the samples.

Both inverses of the metric I + eps D, eq. (6), applied to g are weighted sums of per-sample gradients, sum_i w_i g_i
with sum_i w_i = 1. Nothing here knows where the gradients come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from . import ops, reference
from .gradients import DenseGradients, PerSampleGradients, combine_with_norm

Inverse: TypeAlias = Literal["weak-field", "exact"]


@dataclass(eq=False, repr=False)
class Stats:
    """What the diffusion metric knows of one batch. Tensors stay on the device; reading a number synchronises.

    With g_i the per-sample gradients, g their mean and D their covariance. All are those of the loss whose backward was
    called: if that was multiplied by S, as by a `torch.amp.GradScaler`, so is g, and D by S^2; the epsilon of a policy
    that is invariant to the scale of the loss is then multiplied by 1 / S^2.

    Attributes:
        batch_size: B.
        squared_grad_norm: |g|^2.
        alignments: a_i = <g_i - g, g>, shape (B,).
        squared_norms: |g_i - g|^2, shape (B,).
        centred_gram: the Gramian of g_i - g, shape (B, B), or None where the policy did not need it and the layers
            do not give it for nothing.
        ulp: how much of D rounding leaves where all gradients agree, relative to the largest |g_i|^2; see `rounding`.
        epsilon: what the policy chose; 0 where D = 0 to rounding. None while the policy is choosing.
        weights: w_i, shape (B,), of which the direction is sum_i w_i g_i. None while the policy is choosing.
    """

    batch_size: int
    squared_grad_norm: Tensor
    alignments: Tensor
    squared_norms: Tensor
    centred_gram: Tensor | None
    ulp: float
    epsilon: Tensor | None = None
    weights: Tensor | None = None

    @property
    def grad_norm(self) -> Tensor:
        """|g|."""
        return self.squared_grad_norm.sqrt()

    @cached_property
    def trace(self) -> Tensor:
        """tr D = mean_i |g_i - g|^2."""
        return self.squared_norms.mean()

    @property
    def rayleigh(self) -> Tensor:
        """The Rayleigh quotient g^T D g / |g|^2 = mean_i a_i^2 / |g|^2; 0 where g = 0."""
        squared = self.squared_grad_norm
        return torch.where(squared == 0, squared, self.alignments.square().mean() / squared)

    @cached_property
    def eigenvalues(self) -> Tensor | None:
        """The B largest eigenvalues of D, ascending (at most B - 1 are not zero), or None without the Gramian."""
        if self.centred_gram is None:
            return None
        return reference.eigenvalues(self.centred_gram) / self.batch_size

    @cached_property
    def largest_eigenvalue(self) -> Tensor | None:
        """lambda_max(D), or None without the Gramian."""
        if self.centred_gram is None:
            return None
        return ops.largest_eigenvalue(self.centred_gram, self.ulp) / float(self.batch_size)

    @property
    def rank(self) -> Tensor | None:
        """Number of eigenvalues of D above the rounding of its entries, at most B - 1, or None without the Gramian."""
        if self.eigenvalues is None:
            return None
        largest = (self.squared_grad_norm + 2 * self.alignments + self.squared_norms).max()  # |g_i|^2
        return reference.rank(self.eigenvalues, self.batch_size, largest, self.ulp).clamp(max=self.batch_size - 1)

    @cached_property
    def direction_norm(self) -> Tensor:
        """Norm of the direction, |g + sum_i w_i (g_i - g)|."""
        cross = 2 * self.weights @ self.alignments
        squared = self.squared_grad_norm + cross + self.weights @ self.centred_gram @ self.weights
        return squared.clamp(min=0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine of the angle between the direction and g."""
        product = self.squared_grad_norm + (self.weights * self.alignments).sum()
        norms = self.grad_norm * self.direction_norm
        return torch.where(norms == 0, torch.ones_like(norms), product / norms)

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum_i w_i)^2 / sum_i w_i^2, B for equal weights."""
        return self.weights.sum().square() / self.weights.square().sum()

    @property
    def negative_weights(self) -> Tensor:
        """How many weights are negative."""
        return (self.weights < 0).sum()

    def __repr__(self) -> str:
        names = ("epsilon", "grad_norm", "direction_norm", "cosine", "rayleigh", "trace", "largest_eigenvalue", "rank")
        names += ("effective_sample_size", "negative_weights")
        values = {name: getattr(self, name) for name in names if self.epsilon is not None}
        shown = [f"{name}={value.item():.4g}" for name, value in values.items() if value is not None]
        return f"Stats({', '.join([f'batch_size={self.batch_size}', *shown])})"


@dataclass(frozen=True)
class Fixed:
    """A constant epsilon; the caller answers for eq. (6), and for the loss it was chosen for.

    Args:
        value: epsilon, of the loss before it is scaled.
        loss_scale: what the loss is multiplied by before its backward, or a function that returns it:
            `loss_scale=scaler.get_scale` with a `torch.amp.GradScaler`. D grows with its square, so the epsilon of the
            scaled loss, which is in `Stats`, is value / loss_scale^2.

    Raises:
        ValueError: if `value` is not finite, or `loss_scale` not positive.
        TypeError: if `value` is no number.
    """

    value: float
    loss_scale: float | Callable[[], float] = 1.0
    needs_gram = False

    def __post_init__(self) -> None:
        _check_finite("Fixed", "value", self.value)
        if not callable(self.loss_scale):
            self._check_scale(self.loss_scale)

    def _check_scale(self, scale: float) -> None:
        _check_finite("Fixed", "loss_scale", scale)
        if scale <= 0:
            raise ValueError(f"Fixed(loss_scale={scale}): pass a positive number, or a function that returns one")

    def __call__(self, stats: Stats) -> float:
        """value / loss_scale^2."""
        scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        self._check_scale(scale)
        return self.value / scale**2


@dataclass(frozen=True)
class Spectral:
    """epsilon = fraction / lambda_max(D), eq. (6); needs the Gramian.

    Negative fractions give the weight to the samples that agree with the mean instead of taking it from them.

    Args:
        fraction: of the bound that eq. (6) sets epsilon.
        every: a captured model computes the Gramian and lambda_max in every so many backwards only. In between
            lambda_max is taken to be the same share of tr D as in the last of them, which follows the scale of the loss
            and of D; only then can epsilon exceed eq. (6), by as much as that share grows. `rgd_ext.direction` always
            computes it.

    Raises:
        ValueError: if `fraction` is not finite, is <= -1 (the metric would be singular), or is >= 1 with the
            weak-field inverse (which would be singular or reverse a direction); if `every` is not positive, or is more
            than 1 with the exact inverse, which needs the Gramian itself.
        TypeError: if `every` is not a whole number.
    """

    fraction: float = 0.5
    every: int = 1
    needs_gram = True

    def __post_init__(self) -> None:
        _check_finite("Spectral", "fraction", self.fraction)
        if not isinstance(self.every, int) or isinstance(self.every, bool):
            raise TypeError(f"Spectral(every={self.every!r}): pass a whole number of backwards")
        if self.every < 1:
            raise ValueError(f"Spectral(every={self.every}): pass at least 1")

    def check(self, inverse: Inverse) -> None:
        """Raise ValueError where `inverse` allows no such fraction, or cannot do without the Gramian."""
        _check_fraction("Spectral", self.fraction, inverse)
        if self.every > 1 and inverse == "exact":
            raise ValueError(
                f"Spectral(every={self.every}) with inverse='exact': that inverse needs the Gramian in every backward;"
                " use every=1, or inverse='weak-field'"
            )

    def __call__(self, stats: Stats) -> Tensor:
        """fraction / lambda_max."""
        return self.fraction / stats.largest_eigenvalue


@dataclass(frozen=True)
class Trace:
    """epsilon = fraction / tr D: free of charge, and within eq. (6) because lambda_max <= tr D.

    Raises:
        ValueError: as `Spectral`.
    """

    fraction: float = 0.5
    needs_gram = False

    def __post_init__(self) -> None:
        _check_finite("Trace", "fraction", self.fraction)

    def check(self, inverse: Inverse) -> None:
        """Raise ValueError where `inverse` allows no such fraction."""
        _check_fraction("Trace", self.fraction, inverse)

    def __call__(self, stats: Stats) -> Tensor:
        """fraction / tr D."""
        return self.fraction / stats.trace


@dataclass(frozen=True)
class Rayleigh:
    """epsilon = fraction |g|^2 / (g^T D g): <g, (I - eps D) g> = (1 - fraction) |g|^2, descent for fraction < 1.

    May exceed eq. (6), since the Rayleigh quotient of g is at most lambda_max.

    Raises:
        ValueError: if `fraction` is not finite.
    """

    fraction: float = 0.5
    needs_gram = False

    def __post_init__(self) -> None:
        _check_finite("Rayleigh", "fraction", self.fraction)

    def __call__(self, stats: Stats) -> Tensor:
        """fraction |g|^2 / (g^T D g)."""
        # Where g is orthogonal to the range of D, D g = 0 and any epsilon gives the plain gradient.
        quotient = stats.rayleigh
        return torch.where(quotient == 0, quotient, self.fraction / quotient)


Policy: TypeAlias = Fixed | Spectral | Trace | Rayleigh | Callable[[Stats], float | Tensor]


def _check_finite(policy: str, name: str, value: float) -> None:
    try:
        is_finite = math.isfinite(value)
    except TypeError as error:
        raise TypeError(f"{policy}({name}={value!r}): pass a number") from error
    if not is_finite:
        raise ValueError(f"{policy}({name}={value}): pass a finite number")


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


def checked_policy(epsilon: Policy | float, inverse: Inverse) -> Policy:
    """The policy `epsilon` stands for (a number is `Fixed`), or an error that says what is wrong with the pair."""
    if inverse not in ("weak-field", "exact"):
        raise ValueError(f"inverse is {inverse!r}: choose 'weak-field' or 'exact'")
    if isinstance(epsilon, (int, float)):
        epsilon = Fixed(float(epsilon))
    if not callable(epsilon) or isinstance(epsilon, type):
        raise TypeError(
            f"epsilon is {epsilon!r}: pass a number, a policy like Spectral(0.5), or a callable Stats -> epsilon"
        )
    check = getattr(epsilon, "check", None)
    if check is not None:
        check(inverse)
    return epsilon


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """How much of D rounding leaves where all gradients agree, relative to |g|^2, in statistics of `dtype`.

    On a GPU, float32 statistics may come from matrix units, which truncate when they add, and, if torch allows TF32,
    from gradients rounded to 11 bits. An entry of K may then have a relative error of 2^-10. But K is still the Gramian
    of gradients with relative errors of 2^-11, so where D is zero its value is at most the square of that.
    """
    from_matrix_units = device.type == "cuda" and dtype == torch.float32
    return 2.0**-21 if from_matrix_units else torch.finfo(dtype).eps


def statistics(grads: PerSampleGradients, with_gram: bool) -> Stats:
    """Statistics of the centred gradients: from K = G G^T, or without it where the source can and K is not needed."""
    scalars = None if with_gram or not hasattr(grads, "scalars") else grads.scalars()
    if scalars is not None:
        return Stats(grads.batch_size, *scalars, None, rounding(scalars[1].dtype, scalars[1].device))
    gram = grads.gram()
    return Stats(grads.batch_size, *torch.ops.rgd_ext.gram_moments(gram), rounding(gram.dtype, gram.device))


def exact_weights(stats: Stats) -> Tensor:
    """w of shape (B,) with sum_i w_i g_i = (I + eps D)^-1 g.

    Woodbury's: g - (eps / B) C^T (I + eps Kc / B)^-1 a, with Kc the centred Gramian and a the alignments; the
    coefficients sum to zero, so C^T may be replaced by G^T.
    """
    identity = torch.eye(stats.batch_size, dtype=stats.alignments.dtype, device=stats.alignments.device)
    system = identity + stats.epsilon / stats.batch_size * stats.centred_gram
    coefficients = torch.linalg.solve_ex(system, stats.alignments)[0]
    return (1 - stats.epsilon * coefficients) / stats.batch_size


class LargestEigenvalue:
    """lambda_max of batch after batch for `Spectral(every=...)`: computed now and then, else by its share of tr D.

    Args:
        every: batches.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._batches = 0
        self._share: Tensor | None = None

    @property
    def is_due(self) -> bool:
        """Whether the next batch needs the Gramian."""
        return self._batches % self.every == 0

    def supply(self, stats: Stats) -> None:
        """Give `stats` its lambda_max, or take its share from there."""
        if self.is_due:
            share = stats.largest_eigenvalue / stats.trace
            # After D = 0, or gradients that overflowed: as before, and at first the most it can be.
            known = torch.ones_like(share) if self._share is None else self._share.to(share)
            self._share = torch.where(share.isfinite(), share, known)
        else:
            stats.largest_eigenvalue = self._share.to(stats.trace) * stats.trace
        self._batches += 1

    def state_dict(self) -> dict[str, int | Tensor | None]:
        """How many batches there were, and the last share."""
        return {"batches": self._batches, "share": self._share}

    def load_state_dict(self, state: dict[str, int | Tensor | None]) -> None:
        """Go on after the batches of `state`, from `state_dict`; ValueError for another."""
        batches, share = state.get("batches"), state.get("share")
        is_share = share is None or (isinstance(share, Tensor) and share.shape == () and share.is_floating_point())
        if type(batches) is not int or batches < 0 or not is_share:
            raise ValueError(
                f"{state!r} is no state of Spectral(every=...): expected 'batches', a number, and 'share', a scalar"
                " tensor or None, as state_dict() gives them"
            )
        self._batches, self._share = batches, share


def needs_gram(policy: Policy, inverse: Inverse, largest: LargestEigenvalue | None) -> bool:
    """Whether the next batch needs K = G G^T."""
    is_due = largest is None or largest.is_due
    return inverse == "exact" or (is_due and getattr(policy, "needs_gram", True))


def solve(
    grads: PerSampleGradients, policy: Policy, inverse: Inverse, largest: LargestEigenvalue | None = None
) -> tuple[list[Tensor], Stats]:
    """Statistics -> epsilon -> weights -> combination, for a policy from `checked_policy`."""
    stats = statistics(grads, needs_gram(policy, inverse, largest))
    if largest is not None:
        largest.supply(stats)
    epsilon = _chosen_epsilon(policy, stats)
    # With D = 0 only rounding is left to divide by: the plain gradient is the answer, not amplified noise.
    stats.epsilon, stats.weights = torch.ops.rgd_ext.sample_weights(
        stats.squared_grad_norm, stats.alignments, stats.squared_norms, epsilon, stats.ulp
    )
    if inverse == "exact":
        stats.weights = exact_weights(stats)
    if stats.centred_gram is not None:
        return grads.combine(stats.weights), stats
    direction, squared = combine_with_norm(grads, stats.weights)
    stats.direction_norm = squared.sqrt().to(stats.weights)
    return direction, stats


def _chosen_epsilon(policy: Policy, stats: Stats) -> Tensor:
    epsilon = policy(stats)
    if not isinstance(epsilon, Tensor):
        if not isinstance(epsilon, (int, float)):
            raise TypeError(f"the policy {policy!r} returned {epsilon!r}: return a number or a scalar tensor")
        if not math.isfinite(epsilon) and stats.grad_norm.isfinite():
            raise ValueError(f"the policy {policy!r} returned epsilon = {epsilon}: return a finite number")
        return stats.alignments.new_full((), epsilon)  # made on the device: nothing to wait for
    if epsilon.numel() != 1:
        raise ValueError(f"the policy {policy!r} returned a tensor of shape {tuple(epsilon.shape)}: return a scalar")
    like = stats.alignments
    if epsilon.shape == () and epsilon.dtype == like.dtype and epsilon.device == like.device:
        return epsilon
    return epsilon.to(like).reshape(())


@torch.no_grad()
def direction(
    grads: ops.Tensors | PerSampleGradients, *, epsilon: Policy | float = Spectral(0.5), inverse: Inverse = "weak-field"
) -> tuple[list[Tensor], Stats]:
    """The RGD direction of materialised per-sample gradients: (I - eps D) g, eq. (10), or (I + eps D)^-1 g.

    Args:
        grads: a (B, d) tensor, a sequence of (B, *shape) tensors (as `torch.func.vmap(grad(...))` or Opacus'
            `grad_sample` give them), or any `PerSampleGradients`.
        epsilon: a policy (`Fixed`, `Spectral`, `Trace`, `Rayleigh`), a number (the same as `Fixed`), or a callable
            that takes `Stats` and returns a number or a scalar tensor.
        inverse: "weak-field" for I - eps D, "exact" for (I + eps D)^-1.

    Returns:
        The direction, a list of (*shape) in the dtype of `grads`, and the `Stats` it came from. With D = 0 (B = 1, or
        samples identical to rounding) the direction is the plain mean.

    Raises:
        ValueError, TypeError: for bad gradients (see `rgd_ext.ops.moments`), fractions out of range, an epsilon
            that is not finite.

    Example:
        >>> grads = torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 0.0]])
        >>> step, stats = rgd_ext.direction(grads, epsilon=rgd_ext.Spectral(0.5))
        >>> step[0]
        tensor([1., 0.])
        >>> round(stats.largest_eigenvalue.item(), 4)  # of D = diag(0, 8/3)
        2.6667
    """
    policy = checked_policy(epsilon, inverse)
    return solve(grads if isinstance(grads, PerSampleGradients) else DenseGradients(grads), policy, inverse)
