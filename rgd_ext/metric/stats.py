"""The statistics of one batch: those from which epsilon or weights are chosen, and those of the direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import ClassVar, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import linalg
from ..gradients import Moments, PerSampleGradients
from .noise import unbiased
from .per_parameter import PerParameter

Choice = TypeVar("Choice")
# A vector of the parameter space, as users pass it.
ParameterVector: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
# What leaves as numbers of a batch, and as arrays with a number for each of its samples.
PER_BATCH = (
    *("epsilon", "grad_norm", "squared_grad_norm", "direction_norm", "cosine", "rayleigh", "trace", "unbiased_trace"),
    *("unbiased_squared_grad_norm", "noise_scale", "largest_eigenvalue", "rank", "effective_sample_size"),
    "negative_weights",
)
PER_SAMPLE = ("sample_norms", "alignments", "squared_norms", "aligned", "weights")


class Grams(NamedTuple):
    """The Gramians of a batch.

    Attributes:
        gram: K = G G^T, <g_i, g_j>, shape (B, B), in the dtype in which it was accumulated.
        centred: <g_i - g, g_j - g>, shape (B, B), in the dtype of the moments.
    """

    gram: Tensor
    centred: Tensor


class Known(NamedTuple):
    """What is known of the Gramians of a batch without them.

    Attributes:
        largest_eigenvalue: lambda_max(D), where it is estimated from earlier batches or comes from several processes.
        sample_norms: |g_i|, shape (B,), where several processes have sent them in place of the Gramian.
    """

    largest_eigenvalue: Tensor | None = None
    sample_norms: Tensor | None = None


UNKNOWN = Known()


@dataclass(eq=False, repr=False)
class Statistics:
    """The statistics of a batch before the weights are chosen: what rules and policies are called with.

    With g_i the per-sample gradients, g their mean and D their covariance. All are those of the loss whose backward was
    called: if that was multiplied by c, as by a `torch.amp.GradScaler`, so is g, and D by c^2; the epsilon of a policy
    that is invariant to the scale of the loss is then multiplied by 1 / c^2. Tensors stay on the device, and reading a
    number synchronises.

    Attributes:
        batch_size: the number of samples, B.
        moments: the statistics that need no Gramian.
        grams: the Gramians, or None where they are not needed and the layers do not compute them anyway.
        ulp: the part of D that may be rounding error where all gradients agree, relative to the largest |g_i|^2; see
            `rounding`.
        aligned: <g_i, v> for the vector v of `Preconditioner.align`, shape (B,), or None without one.
        known: what is known of the Gramians without them.
    """

    batch_size: int
    moments: Moments
    grams: Grams | None
    ulp: float
    aligned: Tensor | None = None
    known: Known = UNKNOWN
    # While the gradients are there.
    _align: Callable[[ParameterVector], Tensor] | None = field(default=None, init=False)

    _shown: ClassVar[tuple[str, ...]] = ("grad_norm", "rayleigh", "trace", "noise_scale", "largest_eigenvalue", "rank")

    def __post_init__(self) -> None:
        if self.aligned is not None:
            self.aligned = self.aligned.to(self.alignments)

    @property
    def squared_grad_norm(self) -> Tensor:
        """|g|^2."""
        return self.moments.squared_grad_norm

    @property
    def alignments(self) -> Tensor:
        """a_i = <g_i - g, g>, shape (B,), which sum to zero; <g_i, g> is a_i + |g|^2."""
        return self.moments.alignments

    @property
    def squared_norms(self) -> Tensor:
        """|g_i - g|^2, shape (B,), whose mean is tr D; for |g_i| see `sample_norms`."""
        return self.moments.squared_norms

    @cached_property
    def gram(self) -> Tensor | None:
        """K = G G^T, the Gramian of the g_i, shape (B, B), not centred; None without `grams`."""
        return None if self.grams is None else self.grams.gram.to(self.alignments)

    @property
    def centred_gram(self) -> Tensor | None:
        """The Gramian of g_i - g, shape (B, B); None without `grams`."""
        return None if self.grams is None else self.grams.centred

    @property
    def grad_norm(self) -> Tensor:
        """|g|."""
        return self.squared_grad_norm.sqrt()

    @property
    def sample_norms(self) -> Tensor:
        """|g_i|, shape (B,); not the roots of `squared_norms`, which are those of g_i - g.

        As several processes send them for a rule with `only_sample_norms`; else from the Gramian, if it is there. Else
        from the moments, by |g_i|^2 = |g|^2 + 2 a_i + |g_i - g|^2, which has an error of a few ulps of |g|^2: norms
        that are much smaller than |g| then have few correct digits.
        """
        if self.known.sample_norms is not None:
            return self.known.sample_norms.to(self.alignments)
        if self.grams is not None:
            return self.grams.gram.diagonal().to(self.alignments).clamp(min=0).sqrt()
        return (self.squared_grad_norm + 2 * self.alignments + self.squared_norms).clamp(min=0).sqrt()

    @cached_property
    def trace(self) -> Tensor:
        """tr D = mean_i |g_i - g|^2."""
        return self.squared_norms.mean()

    @property
    def rayleigh(self) -> Tensor:
        """The Rayleigh quotient g^T D g / |g|^2 = mean_i a_i^2 / |g|^2; 0 where g = 0."""
        squared = self.squared_grad_norm
        return torch.where(squared == 0, squared, self.alignments.square().mean() / squared)

    @property
    def unbiased_trace(self) -> Tensor:
        """An unbiased estimate of tr Sigma, with Sigma the covariance of the gradients of single samples, a scalar.

        It is B / (B - 1) tr D for independent samples; NaN for one sample.
        """
        return unbiased(self.batch_size, self.squared_grad_norm, self.trace)[0]

    @property
    def unbiased_squared_grad_norm(self) -> Tensor:
        """An unbiased estimate of |mu|^2, with mu the gradient over all data, a scalar.

        It is |g|^2 - tr Sigma / B, with tr Sigma estimated; negative where noise dominates, and NaN for one sample.
        """
        return unbiased(self.batch_size, self.squared_grad_norm, self.trace)[1]

    @property
    def noise_scale(self) -> Tensor:
        """The gradient noise scale tr Sigma / |mu|^2, in samples, a scalar; tr(Sigma) / |G|^2 in the paper.

        It is the batch size at which the variance of a batch's gradient equals |mu|^2. S. McCandlish et al., *An
        Empirical Model of Large-Batch Training*, 2018 (arXiv 1812.06162), eq. (2.9) and appendix A. `unbiased_trace`
        and `unbiased_squared_grad_norm` have no bias, but their ratio has: for an estimate divide the mean of the first
        over some batches by that of the second, as `Monitor` does.
        """
        return self.unbiased_trace / self.unbiased_squared_grad_norm

    @cached_property
    def eigenvalues(self) -> Tensor | None:
        """The B largest eigenvalues of D, ascending (at most B - 1 are not zero), or None without the Gramian."""
        if self.centred_gram is None:
            return None
        return linalg.eigenvalues(self.centred_gram) / self.batch_size

    @cached_property
    def largest_eigenvalue(self) -> Tensor | None:
        """lambda_max(D); between the batches in which `Spectral(every=...)` computes it, its estimate.

        With `Spectral(across_ranks="bound")`, over several processes, it is the bound. None without the Gramian and
        all these.
        """
        if self.known.largest_eigenvalue is not None:
            return self.known.largest_eigenvalue.to(self.trace)
        if self.centred_gram is None:
            return None
        return torch.ops.rgd_ext.largest_eigenvalue(self.centred_gram, self.ulp) / float(self.batch_size)

    @property
    def rank(self) -> Tensor | None:
        """The number of eigenvalues of D above the rounding of its entries, at most B - 1; None without the Gramian."""
        if self.eigenvalues is None:
            return None
        largest = self.sample_norms.max().square()
        return linalg.rank(self.eigenvalues, self.batch_size, largest, self.ulp).clamp(max=self.batch_size - 1)

    def estimate_largest_eigenvalue(self, share: Tensor) -> None:
        """From now on `largest_eigenvalue` is `share` times tr D."""
        self.known = self.known._replace(largest_eigenvalue=share.to(self.trace) * self.trace)

    def align(self, vectors: ParameterVector) -> Tensor:
        """<g_i, v>, shape (B,), not centred, in the scale of the loss; only while a rule or a policy chooses.

        Args:
            vectors: v, for example the gradient of a validation batch. In a captured model a dict from the names of
                parameters, where missing ones count as zeros, or a sequence with a tensor for each trainable
                parameter, in the order of `model.parameters()`; in `rgd_ext.direction` one for each of its `grads`.

        Raises:
            RuntimeError: later, when the gradients are not there any more.
            ValueError: for wrong names, numbers, shapes or devices.
            TypeError: for wrong dtypes.
        """
        if self._align is None:
            raise RuntimeError(
                "the per-sample gradients are not there: call stats.align(vectors) while a weights= rule or a policy"
                " chooses, or handle.align(vectors) before the backward, and read handle.stats.aligned after it"
            )
        return self._align(vectors).to(self.alignments)

    @contextmanager
    def aligning(self, align: Callable[[ParameterVector], Tensor]) -> Iterator[None]:
        """Inside, `align` may be called."""
        self._align = align
        try:
            yield
        finally:
            self._align = None

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in self._shown}
        shown = [f"{name}={value.item():.4g}" for name, value in values.items() if value is not None]
        return f"{type(self).__name__}({', '.join([f'batch_size={self.batch_size}', *shown])})"


def chosen_by(function: Callable[[Statistics], Choice], stats: Statistics) -> Choice:
    """What a function of a user returns for the statistics; RuntimeError where it fails for want of the Gramian."""
    try:
        return function(stats)
    except (AttributeError, TypeError) as error:
        if stats.grams is not None or "NoneType" not in str(error):
            raise
        raise RuntimeError(
            f"{function!r} failed: {error}. The statistics are without the Gramian, so that gram, eigenvalues,"
            " largest_eigenvalue and rank are None: if it reads one of them, set its attribute `needs` to 'gram', and"
            " leave `only_sample_norms` out"
        ) from error


class Stats(Statistics):
    """What is known of a batch and of the direction it gave: `Statistics`, the weights, and epsilon.

    Args:
        statistics: of the batch; what has been read of them is not computed again.
        weights: w_i, shape (B,), of which the direction is sum_i w_i g_i.
        epsilon: what the policy chose; 0 where D = 0 to rounding, and None where the weights come from no epsilon.
        squared_direction_norm: |sum_i w_i g_i|^2; it may be None if the Gramian is there.

    Attributes:
        weights: as given.
        epsilon: as given.
        per_parameter: the statistics of each parameter by its name, or None where they were not asked for.
    """

    _shown = (
        *("epsilon", "grad_norm", "direction_norm", "cosine", "rayleigh", "trace", "noise_scale", "largest_eigenvalue"),
        *("rank", "effective_sample_size", "negative_weights"),
    )

    def __init__(
        self,
        statistics: Statistics,
        weights: Tensor,
        epsilon: Tensor | None,
        squared_direction_norm: Tensor | None = None,
    ) -> None:
        # With the cached properties, too.
        vars(self).update(vars(statistics))
        self.weights, self.epsilon, self._squared_direction_norm = weights, epsilon, squared_direction_norm
        self.per_parameter: PerParameter | None = None

    def attach(self, per_parameter: PerParameter) -> None:
        """Complete the statistics by those of each parameter."""
        self.per_parameter = per_parameter

    @cached_property
    def direction_norm(self) -> Tensor:
        """The norm of the direction, |s g + sum_i w_i (g_i - g)| with s = sum_i w_i, which is 1 for RGD."""
        if self._squared_direction_norm is not None:
            return self._squared_direction_norm.sqrt().to(self.weights)
        total = self.weights.sum()
        cross = 2 * total * (self.weights @ self.alignments)
        form = self.weights @ self.centred_gram @ self.weights  # type: ignore[operator]  # see the class
        return (total.square() * self.squared_grad_norm + cross + form).clamp(min=0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """The cosine of the angle between the direction and g; 1 where one of them is zero."""
        product = self.weights.sum() * self.squared_grad_norm + (self.weights * self.alignments).sum()
        norms = self.grad_norm * self.direction_norm
        return torch.where(norms == 0, torch.ones_like(norms), product / norms)

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum_i w_i)^2 / sum_i w_i^2, which is B for equal weights; 0 where all are zero."""
        squares = self.weights.square().sum()
        return torch.where(squares == 0, squares, self.weights.sum().square() / squares)

    @property
    def negative_weights(self) -> Tensor:
        """The number of negative weights."""
        return (self.weights < 0).sum()

    def to_dict(self) -> dict[str, float | np.ndarray]:
        """Numbers of the batch, and arrays of shape (B,) for its samples, NaN for those that are None.

        It waits for the device. `pandas.DataFrame(stats.to_dict())` has a row for each sample. The Gramian and its
        eigenvalues are not in it, nor `per_parameter`, which has a `to_dict` of its own. Where the Gramian is there,
        `rank` takes an eigenvalue decomposition of it.

        Example:
            >>> _, stats = rgd_ext.direction(torch.tensor([[1.0, 2.0], [1.0, -2.0]]), epsilon=0.0)
            >>> found = stats.to_dict()
            >>> found["trace"], found["alignments"]
            (4.0, array([0., 0.]))
        """
        return {"batch_size": self.batch_size, **on_host(self, *PER_BATCH, *PER_SAMPLE)}


def on_host(stats: Stats, *names: str) -> dict[str, float | np.ndarray]:
    """Those of `PER_BATCH` and `PER_SAMPLE` with these names, as `Stats.to_dict` has them, in one transfer."""
    like = stats.alignments.double()
    missing = torch.full_like(like, math.nan)
    missing_of = {name: missing if name in PER_SAMPLE else missing[0] for name in names}
    found = {name: getattr(stats, name) for name in names}
    values = [(missing_of[name] if value is None else value).to(like).reshape(-1) for name, value in found.items()]
    parts = np.split(torch.cat(values).cpu().numpy(), np.cumsum([len(value) for value in values])[:-1])
    return {name: part if name in PER_SAMPLE else part.item() for name, part in zip(names, parts, strict=True)}


def statistics(
    grads: PerSampleGradients,
    with_gram: bool,
    aligned: Tensor | None = None,
    known: Known = UNKNOWN,
) -> Statistics:
    """The statistics of a batch, from K = G G^T if `with_gram`, or if the source has no moments without it.

    Args:
        grads: the per-sample gradients.
        with_gram: whether the Gramian is needed.
        aligned, known: of `Statistics`.
    """
    moments = None if with_gram else grads.moments()
    if moments is not None:
        return statistics_of(moments, aligned, known)
    gram = grads.gram()
    *found, centred = torch.ops.rgd_ext.gram_moments(gram)
    ulp = rounding(gram.dtype, gram.device)
    return Statistics(grads.batch_size, Moments(*found), Grams(gram, centred), ulp, aligned, known)


def statistics_of(moments: Moments, aligned: Tensor | None = None, known: Known = UNKNOWN) -> Statistics:
    """The statistics of a batch without a Gramian."""
    like = moments.alignments
    return Statistics(len(like), moments, None, rounding(like.dtype, like.device), aligned, known)


@cache
def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The part of D that may be rounding error where all gradients agree, relative to |g|^2, in statistics of `dtype`.

    On a GPU, float32 statistics may come from matrix units, which truncate when they add, and, if torch allows TF32,
    from gradients rounded to 11 bits. An entry of K may then have a relative error of 2^-10. But K is still the Gramian
    of gradients with relative errors of 2^-11, so where D is zero its value is at most the square of that.
    """
    from_matrix_units = device.type == "cuda" and dtype == torch.float32
    return 2.0**-21 if from_matrix_units else torch.finfo(dtype).eps
