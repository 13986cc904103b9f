"""From per-sample gradients to the direction: statistics -> weights -> combination.

Nothing here knows where the gradients come from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..gradients import DenseGradients, PerSampleGradients, adapted
from .inverses import Inverse
from .policies import Epsilon, Policy, Spectral
from .relativistic import Relativistic
from .rules import Rule, State, UserRule, Weights
from .stats import UNKNOWN, Known, ParameterVector, Stats, statistics, statistics_of


def checked_rule(epsilon: Epsilon | None, inverse: Inverse | None, weights: Weights | None) -> Rule:
    """The rule that the arguments of `precondition`, `RGD` and `direction` stand for.

    Raises:
        TypeError: for `weights` together with one of the others, or what is neither a policy nor a rule.
        ValueError: for a policy out of range, or an `inverse` that does not suit it.
    """
    if weights is None:
        return Relativistic(Spectral(0.5) if epsilon is None else epsilon, "weak-field" if inverse is None else inverse)
    given = {name: value for name, value in (("epsilon", epsilon), ("inverse", inverse)) if value is not None}
    if given:
        names = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise TypeError(f"got weights={weights!r} and {names}: pass one or the other, since a rule chooses all weights")
    if isinstance(weights, Policy):
        raise TypeError(f"weights is the policy {weights!r}: pass it as epsilon")
    return UserRule(weights)


class Solver:
    """Computes the directions of a sequence of batches, such as those of a captured model.

    Args:
        rule: chooses the weights.

    Attributes:
        rule: the argument.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    @property
    def needs_gram(self) -> bool:
        """Whether the next batch needs K = G G^T."""
        return self.rule.needs == "gram"

    def solve(
        self,
        grads: PerSampleGradients,
        with_gram: bool,
        align: Callable[[ParameterVector], Tensor] | None = None,
        aligned: Tensor | None = None,
    ) -> tuple[list[Tensor], Stats]:
        """The direction of a batch, a list of (*param.shape) tensors, and the `Stats` it came from.

        Args:
            grads: of the batch.
            with_gram: what `needs_gram` was when the batch began.
            align: gives <g_i, v> for a v as users pass it; by default `grads.align`.
            aligned: the <g_i, v> for the v that was asked for in advance, if any.
        """
        at_once = grads.moments_and_mean() if self.rule.is_mean and not with_gram else None
        if at_once is not None:
            moments, mean = at_once
            found = statistics_of(moments, aligned)
            return mean, Stats(found, *self.rule.choose(found), moments.squared_grad_norm)
        known = self._known_of(grads) if with_gram else UNKNOWN
        found = statistics(grads, with_gram and all(each is None for each in known), aligned, known)
        with found.aligning(align or grads.align):  # type: ignore[arg-type]  # a source of the user's defines what it takes
            weights, epsilon = self.rule.choose(found)
        weights, epsilon = grads.agreed(weights, epsilon)
        if self.rule.is_mean:
            return grads.combine(weights), Stats(found, weights, epsilon, found.squared_grad_norm)
        # Weights that cancel leave no correct digits of a norm from the Gramian; those of the metric sum to one.
        if found.grams is not None and epsilon is not None:
            return grads.combine(weights), Stats(found, weights, epsilon)
        direction, squared_norm = grads.combine_with_norm(weights)
        return direction, Stats(found, weights, epsilon, squared_norm)

    def _known_of(self, grads: PerSampleGradients) -> Known:
        """What the rule reads of the Gramian, where that is found without it."""
        method = self.rule.eigenvalue_method
        eigenvalue = None if method is None else grads.largest_eigenvalue(method)
        return Known(eigenvalue, grads.sample_norms() if self.rule.only_sample_norms else None)

    def rehearsal(self) -> Solver:
        """A solver that does the work of the next batch, for timings; it calls no policy and no rule of the user's."""
        return Solver(self.rule.rehearsal())

    def state_dict(self) -> State:
        """What later directions depend on besides the gradients: the memory of `Spectral(every=...)`, or nothing."""
        return self.rule.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go on from where `state_dict` was called; an empty dict lets the rule begin anew, and others ignore it.

        Raises:
            ValueError: if `state` is not from a `state_dict`; nothing is changed then.
        """
        if not isinstance(state, dict) or not state.keys() <= {"largest_eigenvalue"}:
            raise ValueError(
                f"a handle has no state {state!r}: pass what its state_dict() gave, which the state_dict() of RGD"
                " has under 'preconditioner'"
            )
        self.rule.load_state_dict(state)


@torch.no_grad()
def direction(
    grads: ops.Tensors | PerSampleGradients,
    *,
    epsilon: Epsilon | None = None,
    inverse: Inverse | None = None,
    weights: Weights | None = None,
) -> tuple[list[Tensor], Stats]:
    """The RGD direction of materialised per-sample gradients, (I - eps D) g, eq. (10), or (I + eps D)^-1 g.

    Args:
        grads: a (B, d) tensor, a sequence of (B, *shape) tensors (as `torch.func.vmap(grad(...))` or Opacus'
            `grad_sample` give them), or any `PerSampleGradients`.
        epsilon: a policy (`Fixed`, `Spectral`, `Trace`, `Rayleigh`, `Ascent`), a number (the same as `Fixed`), or a
            callable from `Statistics` to a number or a scalar tensor. By default it is `Spectral(0.5)`.
        inverse: "weak-field", the default, for I - eps D, "exact" for (I + eps D)^-1.
        weights: in place of both, a weighting rule: a callable from `Statistics` to w, (B,), such as those of
            `rgd_ext.weights`. The direction is then sum_i w_i g_i.

    Returns:
        The direction, a list of (*shape) in the dtype of `grads`, and the `Stats` it came from. With D = 0 (B = 1, or
        samples identical to rounding) the direction of a policy is the plain mean.

    Raises:
        ValueError, TypeError: for bad gradients (see `rgd_ext.ops.moments`), fractions out of range, an epsilon
            that is not finite, or weights that are not a finite tensor (B,); TypeError for `weights` together with
            `epsilon` or `inverse`.

    Example:
        >>> grads = torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 0.0]])
        >>> step, stats = rgd_ext.direction(grads, epsilon=rgd_ext.Spectral(0.5))
        >>> step[0]
        tensor([1., 0.])
        >>> round(stats.largest_eigenvalue.item(), 4)  # of D = diag(0, 8/3)
        2.6667
        >>> clipped, _ = rgd_ext.direction(grads, weights=rgd_ext.weights.Clip(1.0))  # each g_i to a norm of 1
        >>> clipped[0]
        tensor([0.6315, 0.0000])
    """
    solver = Solver(checked_rule(epsilon, inverse, weights))
    source = adapted(grads) if isinstance(grads, PerSampleGradients) else DenseGradients(grads)
    align = source.align_with if isinstance(source, DenseGradients) else None
    return solver.solve(source, solver.needs_gram, align)
