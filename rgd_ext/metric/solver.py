"""From per-sample gradients to the direction: statistics -> epsilon -> weights -> combination.

Nothing here knows where the gradients come from.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..gradients import DenseGradients, PerSampleGradients, adapted
from .policies import Epsilon, Fixed, Spectral, checked_policy, chosen_epsilon
from .stats import Statistics, Stats, statistics
from .weights import Inverse, exact_weights, weak_field_weights

# Of an `EigenvalueShare`: a number of batches and a tensor or None.
State: TypeAlias = dict[str, Any]


class EigenvalueShare:
    """lambda_max / tr D over a sequence of batches, for `Spectral(every=...)`.

    It is measured in every `every`-th batch; in the batches between, lambda_max is estimated from the last value.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._batches = 0
        self._share: Tensor | None = None

    @property
    def is_due(self) -> bool:
        """Whether the next batch is one in which it is measured, for which the Gramian is needed."""
        return self._share is None or self._batches % self.every == 0

    def statistics(self, grads: PerSampleGradients, with_gram: bool) -> Statistics:
        """The statistics of the next batch, with lambda_max estimated if the measurement is not due."""
        if not self.is_due:
            self._batches += 1
            return statistics(grads, with_gram, self._share)
        found = statistics(grads, with_gram)
        share = torch.div(found.largest_eigenvalue, found.trace)  # type: ignore[arg-type]  # Spectral has it
        # Where D = 0, or where gradients have overflowed, the last value stays; at first the largest possible one.
        known = torch.ones_like(share) if self._share is None else self._share.to(share)
        self._share = torch.where(share.isfinite(), share, known)
        self._batches += 1
        return found

    def state_dict(self) -> State:
        """The number of batches there were, and the last share."""
        return {"batches": self._batches, "share": self._share}

    def load_state_dict(self, state: State) -> None:
        """Go on after the batches of `state`, from `state_dict`; ValueError for another."""
        batches, share = state.get("batches"), state.get("share")
        is_share = share is None or (isinstance(share, Tensor) and share.shape == () and share.is_floating_point())
        if type(batches) is not int or batches < 0 or not is_share:
            raise ValueError(
                f"{state!r} is no state of Spectral(every=...): expected 'batches', a number, and 'share', a scalar"
                " tensor or None, as state_dict() gives them"
            )
        self._batches, self._share = batches, share


class Solver:
    """Computes the directions of a sequence of batches, such as those of a captured model.

    Args:
        epsilon: a policy, a number or a callable, as `direction` takes it.
        inverse: "weak-field" for I - eps D, "exact" for (I + eps D)^-1.

    Attributes:
        policy: the policy that `epsilon` stands for.
        inverse: the argument.

    Raises:
        ValueError: if the policy or `inverse` is out of range, or one does not suit the other.
        TypeError: if `epsilon` is no policy.
    """

    def __init__(self, epsilon: Epsilon, inverse: Inverse) -> None:
        self.policy, self.inverse = checked_policy(epsilon, inverse), inverse
        self._share = EigenvalueShare(self.policy.every) if self.policy.every > 1 else None

    @property
    def needs_gram(self) -> bool:
        """Whether the next batch needs K = G G^T."""
        return self.inverse == "exact" or ((self._share is None or self._share.is_due) and self.policy.needs_gram)

    def solve(self, grads: PerSampleGradients) -> tuple[list[Tensor], Stats]:
        """The direction of a batch, a list of (*param.shape) tensors, and the `Stats` it came from."""
        source = statistics if self._share is None else self._share.statistics
        found = source(grads, self.needs_gram)
        epsilon, weights = weak_field_weights(found, chosen_epsilon(self.policy, found))
        if self.inverse == "exact":
            weights = exact_weights(found, epsilon)
        if found.centred_gram is not None:
            return grads.combine(weights), Stats(found, epsilon, weights)
        direction, squared_norm = grads.combine_with_norm(weights)
        return direction, Stats(found, epsilon, weights, squared_norm)

    def rehearsal(self) -> Solver:
        """A solver that does the work of the next batch, for timings; a user's policy is not called by it."""
        return Solver(Spectral() if self.needs_gram else Fixed(0), self.inverse)

    def state_dict(self) -> dict[str, State]:
        """What later directions depend on besides the gradients: the memory of `Spectral(every=...)`, or nothing."""
        return {} if self._share is None else {"largest_eigenvalue": self._share.state_dict()}

    def load_state_dict(self, state: dict[str, State]) -> None:
        """Go on from where `state_dict` was called; an empty dict lets the policy begin anew, and others ignore it.

        Raises:
            ValueError: if `state` is not from a `state_dict`; nothing is changed then.
        """
        if not isinstance(state, dict) or not state.keys() <= {"largest_eigenvalue"}:
            raise ValueError(
                f"a handle has no state {state!r}: pass what its state_dict() gave, which the state_dict() of RGD"
                " has under 'preconditioner'"
            )
        if self._share is not None:
            share = EigenvalueShare(self._share.every)
            if state:
                share.load_state_dict(state["largest_eigenvalue"])
            self._share = share


@torch.no_grad()
def direction(
    grads: ops.Tensors | PerSampleGradients, *, epsilon: Epsilon = Spectral(0.5), inverse: Inverse = "weak-field"
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
    solver = Solver(epsilon, inverse)
    return solver.solve(adapted(grads) if isinstance(grads, PerSampleGradients) else DenseGradients(grads))
