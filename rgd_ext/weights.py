"""Weighting rules for per-sample gradients: `weights=` of `precondition`, `RGD` and `direction`.

A weighting rule is any callable from the `Statistics` of a batch to w, shape (B,); the direction is sum_i w_i g_i, and
1/B for each sample gives the mean gradient. Its attribute `needs` says what it reads: "gram", the default, for the
Gramian and the eigenvalues, "norms" or "alignments" for what needs no Gramian (today these two cost the same). It is
read before every backward, so that a rule may ask for the Gramian now and then. If `stats.sample_norms` are all that it
reads of the Gramian, its attribute `only_sample_norms = True` spares several processes from sending that.
`stats.align(vectors)` gives the inner products with a vector of the parameter space. The rule is called once for each
direction, without autograd. It may read numbers, for which the host then waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .metric import Statistics
from .metric.arguments import LossScale, Need, check_positive, check_scale, current_scale, is_of_torchjd

__all__ = ["Clip", "FromGramian", "Normalise"]


@dataclass(frozen=True)
class FromGramian:
    """Weights from a function of the Gramian, such as a weighting of `torchjd.aggregation`.

    Args:
        function: takes K = G G^T, shape (B, B), with K_ij = <g_i, g_j> in the dtype of the model's gradients (float32
            for 16 bits), and returns w, shape (B,).

    Raises:
        TypeError: if `function` is not callable, or an aggregator of TorchJD, which gives a direction.

    Example:
        >>> grads = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> by_norm = rgd_ext.weights.FromGramian(lambda gram: gram.diagonal() / gram.trace())
        >>> rgd_ext.direction(grads, weights=by_norm)[0]
        [tensor([0.2000, 1.6000])]
    """

    needs: ClassVar[Need] = "gram"
    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise TypeError(
                f"FromGramian({self.function!r}): pass a callable (B, B) -> (B,), such as"
                " torchjd.aggregation.UPGradWeighting()"
            )
        if is_of_torchjd(self.function, "Aggregator"):
            raise TypeError(
                f"FromGramian({self.function!r}): an aggregator gives a direction and not weights; pass its weighting,"
                " such as torchjd.aggregation.UPGradWeighting()"
            )

    def __call__(self, stats: Statistics) -> Tensor:
        """function(K); NaN where K is not finite, which solvers would refuse: the host waits for that answer."""
        # In the dtype of the gradients, in which weightings of TorchJD compute; and a copy, which they may change.
        gram = stats.grams.gram.clone()  # type: ignore[union-attr]  # see `needs`
        return self.function(gram) if gram.isfinite().all() else gram.new_full(gram.shape[:1], math.nan)


@dataclass(frozen=True)
class Clip:
    """w_i = min(1, max_norm / |g_i|) / B: the mean of per-sample gradients, each clipped to a norm of `max_norm`.

    It limits the influence of single samples. It is not differentially private training, which also needs calibrated
    noise, Poisson sampling and privacy accounting: use Opacus for that.

    Args:
        max_norm: in the units of the gradients of the samples' losses, before the loss is scaled.
        loss_scale: what the mean loss is multiplied by before its backward, or a function that returns it:
            `loss_scale=scaler.get_scale` with a `torch.amp.GradScaler`, the batch size with the sum of the losses.

    Raises:
        ValueError: if `max_norm` or `loss_scale` is not positive and finite; a function is called in every backward.
        TypeError: if `max_norm` or `loss_scale` is not a number.
    """

    needs: ClassVar[Need] = "gram"  # norms from moments would have an error of some ulps of |g|
    only_sample_norms: ClassVar[bool] = True
    max_norm: float
    loss_scale: LossScale = 1.0

    def __post_init__(self) -> None:
        check_positive("Clip", "max_norm", self.max_norm)
        check_scale("Clip", self.loss_scale)

    def __call__(self, stats: Statistics) -> Tensor:
        """min(1, max_norm loss_scale / |g_i|) / B."""
        limit = self.max_norm * current_scale("Clip", self.loss_scale)
        weights = (limit / stats.sample_norms).clamp(max=1) / stats.batch_size
        # Squares have overflowed, so that the norm is not known: a weight of 0 would drop the sample.
        return weights.masked_fill(stats.sample_norms.isinf(), math.nan)


@dataclass(frozen=True)
class Normalise:
    """w_i = 1 / (B |g_i|): the mean of per-sample gradients of norm one; 0 for those whose |g_i|^2 is zero.

    Args:
        loss_scale: as for `Clip`; by it the weights are multiplied, so that unscaling leaves norms of one.

    Raises:
        ValueError: if `loss_scale` is not positive and finite; a function is called in every backward.
        TypeError: if `loss_scale` is not a number.
    """

    needs: ClassVar[Need] = "gram"  # as for `Clip`
    only_sample_norms: ClassVar[bool] = True
    loss_scale: LossScale = 1.0

    def __post_init__(self) -> None:
        check_scale("Normalise", self.loss_scale)

    def __call__(self, stats: Statistics) -> Tensor:
        """loss_scale / (B |g_i|)."""
        norms = stats.sample_norms
        weights = current_scale("Normalise", self.loss_scale) / (stats.batch_size * norms)
        return weights.masked_fill(norms == 0, 0.0)
