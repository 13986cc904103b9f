"""The proof that a capture gives every sample of a batch its own gradient, without the user's loss.

With random cotangents v of the outputs: (a) the contributions of the samples add up to autograd's gradient of <v, out>,
parameter by parameter; (b) those of a few samples are what autograd gives for each of them alone. No rule about shapes
or layers enters.
"""

from __future__ import annotations

import time
from operator import attrgetter

from torch import Tensor

from ..batch import ONE_AT_A_TIME
from ..findings import NothingToProve, Verification
from .comparison import Comparison
from .forwards import Forwards
from .runs import Runs
from .sketch import Difference

# A note about outputs that are neither losses nor have a part for each sample.
_JOINED = (
    "its outputs have no part for each sample. If the arguments hold several samples in one tensor, as graphs that are"
    f" joined, {ONE_AT_A_TIME}"
)


class Proof:
    """The proof for one call of a captured module, by `runs` of it."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._notes: list[str] = []
        self._has_zeros = False
        self._outputs: dict[int, Tensor] = {}

    def verification(self) -> Verification:
        """Carry out the proof.

        Raises:
            WrongGradients: if the capture is wrong, naming the parameter, the module, the error and a remedy.
            Unprovable: if that cannot be found out.
        """
        begin = time.perf_counter()
        runs = self._runs
        if not runs.gradients.parameters or runs.batch_size == 0:
            raise NothingToProve("it has no trainable parameters, or no samples")
        forwards = self._forwards()
        # Where samples have outputs of their own these tell them apart; otherwise the model gives its loss.
        own, shared, samples = forwards.own_outputs(), forwards.shared_outputs(), forwards.samples
        if len(own) + len(shared) < len(forwards.batch):
            self._notes.append("outputs that have no part for every sample were left out")
        if own:
            differences = self._by_samples(forwards, own, shared)
        else:
            if samples and any(forwards.batch[n].ndim > 1 for n in shared):
                self._notes.append(_JOINED)
            differences = self._one_by_one(forwards, shared, False)
        worst = max(differences, key=attrgetter("error"))
        return Verification(
            batch_size=runs.batch_size,
            parameters=len(runs.gradients.parameters),
            samples=tuple(each.index for each in samples) if own or len(differences) == 1 + len(samples) else (),
            largest_error=worst.error,
            where=runs.gradients.name_of(worst.index),
            tolerance=forwards.tolerance,
            seconds=time.perf_counter() - begin,
            note="; ".join(dict.fromkeys(self._notes)),
            outputs=self._outputs,
            is_open=self._has_zeros or runs.environment.has_other_side,
        )

    def _forwards(self) -> Forwards:
        forwards = Forwards(self._runs)
        self._notes += forwards.notes
        return forwards

    def _by_samples(self, forwards: Forwards, own: list[int], shared: list[int]) -> list[Difference]:
        """Compare all at once; if that shows an error, one after the other, with forwards anew, to tell which."""
        comparison = Comparison(self._runs, forwards)
        difference = comparison.together(own, shared)
        self._keep(comparison)
        if difference.error <= forwards.tolerance:
            return [difference]
        differences = self._one_by_one(self._forwards(), own, True)
        if shared:
            differences += self._one_by_one(self._forwards(), shared, False)
        return differences

    def _one_by_one(self, forwards: Forwards, used: list[int], own: bool) -> list[Difference]:
        comparison = Comparison(self._runs, forwards)
        differences = comparison.one_by_one(used, own)
        self._keep(comparison)
        return differences

    def _keep(self, comparison: Comparison) -> None:
        self._notes += comparison.notes
        self._has_zeros |= comparison.has_zeros
        self._outputs |= comparison.outputs
