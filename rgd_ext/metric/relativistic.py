"""The rule of relativistic gradient descent: a policy chooses epsilon, and an inverse of the metric the weights."""

from __future__ import annotations

from torch import Tensor

from .arguments import Need
from .eigenvalue_share import EigenvalueShare
from .inverses import Inverse, exact_weights, weak_field_weights
from .policies import Epsilon, Fixed, Spectral, checked_policy, chosen_epsilon
from .rules import Rule, State
from .stats import Statistics


class Relativistic(Rule):
    """The weights with which sum_i w_i g_i = (I - eps D) g, eq. (10), or (I + eps D)^-1 g.

    Args:
        epsilon: a policy, a number or a callable, as `direction` takes it.
        inverse: "weak-field" for I - eps D, "exact" for (I + eps D)^-1.

    Attributes:
        policy: the policy that `epsilon` stands for.
        inverse: the argument.

    Raises:
        ValueError: if the policy or `inverse` is out of range, or one does not suit the other.
        TypeError: if `epsilon` is not a policy.
    """

    def __init__(self, epsilon: Epsilon, inverse: Inverse) -> None:
        self.policy, self.inverse = checked_policy(epsilon, inverse), inverse
        self._share = EigenvalueShare(self.policy.every) if self.policy.every > 1 else None
        if isinstance(self.policy, Spectral) and inverse == "weak-field":
            self.eigenvalue_method = self.policy.across_ranks
        self.is_additive = isinstance(self.policy, Fixed) and self.policy.value == 0

    def __repr__(self) -> str:
        return f"{self.policy}, inverse={self.inverse!r}"

    @property
    def needs(self) -> Need:
        """The Gramian for the exact inverse, and what the policy needs."""
        if self.inverse == "exact":
            return "gram"
        return self.policy.needs if self._share is None or self._share.is_due else "norms"

    def choose(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        """The weights, (B,), and epsilon."""
        if self._share is not None:
            self._share.update(stats)
        # It also sets epsilon to 0 where D = 0.
        epsilon, weights = weak_field_weights(stats, chosen_epsilon(self.policy, stats))
        return (weights if self.inverse == "weak-field" else exact_weights(stats, epsilon)), epsilon

    def rehearsal(self) -> Rule:
        """A rule of the same inverse that needs the same, and calls no policy of the user's."""
        return Relativistic(Spectral() if self.needs == "gram" else Fixed(0), self.inverse)

    def state_dict(self) -> State:
        """The memory of `Spectral(every=...)`; nothing for other policies."""
        return {} if self._share is None else {"largest_eigenvalue": self._share.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Go on from where `state_dict` was called; ValueError for another state."""
        if self._share is not None:
            share = EigenvalueShare(self._share.every)
            if state:
                share.load_state_dict(state["largest_eigenvalue"])
            self._share = share
