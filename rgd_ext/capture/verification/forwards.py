"""The outputs that a proof needs: the captured ones of a batch, and the ordinary ones of some samples alone."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ...batch_norm import batch_norms
from ..findings import (
    ForwardFailed,
    NotFinite,
    NothingToProve,
    NotRepeatable,
    Unprovable,
    WrongGradients,
    tolerance_of,
)
from .runs import Runs
from .sample_forward import SampleForward, compared_with


class Forwards:
    """The outputs of a captured forward of a batch, and of ordinary forwards of its first and last sample alone.

    Args:
        runs: the runs of the call.

    Attributes:
        batch: the captured outputs of real numbers, by their places among all tensors that the module gives.
        samples: those of the first and the last sample; empty where they prove nothing, or are not possible.
        tolerance: the largest relative error that is rounding.
        notes: what cannot be compared, and why.

    Raises:
        Unprovable: if there are no such outputs, or if the forward cannot be called again.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs, self.notes = runs, []
        # The capture comes first: if the forward cannot be called again, its output is the user's.
        self.batch = self._captured()
        if runs.environment.equalise_draws():
            self.batch.clear()  # or two of them would be there at once
            self.batch = self._captured()
        output, draws_elsewhere = runs.faithful_output(), runs.environment.draws_elsewhere()
        self.tolerance = self._largest_rounding()
        self.samples = self._sample_forwards(draws_elsewhere)
        if not self.samples:
            self._check_repeatable(output)

    def own_outputs(self) -> list[int]:
        """The places of outputs that have a part for each sample, which tells the samples apart."""
        return [n for n in self._fitting() if self.samples and self.samples[0].splits[n] is not None]

    def shared_outputs(self) -> list[int]:
        """The places of the other outputs that fit those of samples alone, such as losses."""
        own = self.own_outputs()
        return [n for n in self._fitting() if n not in own]

    def _fitting(self) -> list[int]:
        return [n for n in self.batch if all(n in sample.splits for sample in self.samples)]

    def _captured(self) -> dict[int, Tensor]:
        try:
            outputs = self._runs.captured_forward()
        except WrongGradients:
            raise
        except Exception as error:
            raise ForwardFailed(f"its captured forward raises {type(error).__name__}: {error}") from error
        if not outputs:
            raise Unprovable("there is no tensor among its outputs")
        batch = {n: x for n, x in enumerate(outputs) if x.is_floating_point()}
        if not batch:
            raise NothingToProve("none of its outputs holds real numbers")
        if not all(x.isfinite().all() for x in batch.values()):
            raise NotFinite("its outputs are not finite")
        return batch

    def _largest_rounding(self) -> float:
        tensors = [*self.batch.values(), *self._runs.gradients.parameters]
        return max(tolerance_of(x, not self._runs.environment.lacks_autocast) for x in tensors)

    def _check_repeatable(self, output: list[object] | None) -> None:
        """Raise NotRepeatable if the forward cannot be called again, with the output of the call it was."""
        try:
            with torch.no_grad():
                self._runs.forward()
        except NotRepeatable as error:
            raise NotRepeatable(str(error), output) from error.__cause__

    def _sample_forwards(self, draws_elsewhere: bool) -> list[SampleForward]:
        """Those of the first and the last sample; none where they prove nothing, or are not possible."""
        size = self._runs.batch_size
        if size is None:
            self.notes.append("no tensor among the arguments tells the samples apart; only the sum was checked")
        if size in (None, 1) or self._has_batch_statistics():
            return []
        # Where other libraries draw the random numbers, only copies in all places get the same.
        counts = [size] if draws_elsewhere else sorted({1, 2, size})
        try:
            found = [self._sample_forward(index, counts) for index in (0, size - 1)]
        except Unprovable as reason:
            self.notes.append(f"a sample alone cannot be compared: {reason}; only the sum over all was checked")
            return []
        unknown_draws = self._runs.environment.unknown_draws
        if unknown_draws:
            draws = ", ".join(sorted(unknown_draws))
            self.notes.append(f"the random numbers of {draws} depend on the batch; only the sum over all was checked")
            return []
        return found

    def _has_batch_statistics(self) -> bool:
        layers = batch_norms(self._runs.call.recorder.module).values()
        return any(layer.training or layer.running_mean is None for layer in layers)

    def _sample_forward(self, index: int, counts: list[int]) -> SampleForward:
        """The forward of a sample, in the smallest of `counts` copies that give the outputs it has in the batch.

        Where no number of copies does, it is the smallest one whose outputs differ by a finite number.
        """
        size = self._runs.batch_size
        found: list[SampleForward] = []
        reason = Unprovable("no argument has as many rows as there are samples")
        for count in counts:
            for reading in self._runs.arguments.readings(size):
                try:
                    outputs = self._runs.forward(partial(reading, torch.tensor([index] * count)))
                    sample = compared_with(self.batch, index, size, outputs, count)
                except Unprovable as error:
                    reason = error
                    continue
                if sample is None:
                    reason = Unprovable("its outputs have other dimensions")
                elif sample.difference <= self.tolerance:
                    return sample
                else:
                    found.append(sample)
        if not found:
            raise reason
        return min(found, key=lambda sample: (sample.difference == math.inf, sample.count))
