"""Contributions of samples compared with autograd's gradients, for random cotangents of the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..findings import NotFinite, NothingToProve, Unprovable
from .forwards import Forwards
from .gradients import cotangent
from .refutation import Refutation
from .runs import Runs
from .sample_forward import SampleForward
from .sketch import Difference, fitted, largest_difference, norm, sketch


class Comparison:
    """A comparison of the samples' contributions with autograd's gradients. It releases the outputs of the batch.

    Args:
        runs: the runs of the call.
        forwards: the outputs that are compared.

    Attributes:
        has_zeros: whether gradients were next to nothing, so that an error would not have been seen.
        outputs: sketches of the outputs, by their places, if there are hooks inside that did not run.
        notes: what could not be compared, and why.
    """

    def __init__(self, runs: Runs, forwards: Forwards) -> None:
        self._runs, self._gradients = runs, runs.gradients
        self._batch, self._samples, self._tolerance = forwards.batch, forwards.samples, forwards.tolerance
        self.has_zeros = False
        self.outputs: dict[int, Tensor] = {}
        self.notes: list[str] = []

    def together(self, own: list[int], shared: list[int]) -> Difference:
        """All at once, which as a rule is enough: a sum with random weights, and samples alone as large as the sum.

        Weights on the samples' contributions and on their cotangents are the same, as long as every sample has its own.
        The outputs `shared` by all samples must add nothing but what goes through the `own` outputs of each, as a loss
        of these does.
        """
        size, weights = self._runs.batch_size, self._weights()
        cotangents = {n: cotangent(self._batch[n], n) for n in own}
        factors = {sample.index: (-1.3) ** n * size**0.5 for n, sample in enumerate(self._samples)}
        values = _sketched(self._batch)
        contributions = self._gradients.contributions(self._batch, cotangents, size)
        of_samples = weights.clone()
        for index, factor in factors.items():
            of_samples[index] += factor
        found = self._gradients.sums(contributions, of_samples)
        missing = [p not in contributions for p in self._gradients.parameters]
        del contributions
        for n, v in cotangents.items():
            v.copy_(self._samples[0].splits[n].scaled(v, weights))
        expected = self._expected(values, cotangents, shared)
        if any(is_missing and norm([each]) for is_missing, each in zip(missing, expected, strict=True)):
            return Difference(math.inf, 0)
        for sample in self._samples:
            (weighted,) = self._columns(sample, cotangents, True)
            factor = factors[sample.index] / weights[sample.index].item()
            expected = [e + factor * h for e, h in zip(expected, weighted, strict=True)]
        return largest_difference(found, expected, self._tolerance)

    def one_by_one(self, used: list[int], own: bool) -> list[Difference]:
        """One after the other: the sum over the samples, some of them, and all with random weights.

        Args:
            used: the places of the outputs that have cotangents.
            own: whether every sample has its own part of these.

        Raises:
            WrongGradients: if one of them differs by more than rounding.
            Unprovable: if that cannot be found out.
        """
        refutation = Refutation(self._runs, self._tolerance, self._samples)
        cotangents = {n: cotangent(self._batch[n], n) for n in used}
        values = _sketched(self._batch)
        contributions = self._gradients.contributions(self._batch, cotangents, self._runs.batch_size)
        expected = self._expected(values, cotangents, [])
        for place, parameter in enumerate(self._gradients.parameters):
            if parameter not in contributions and norm([expected[place]]):
                raise refutation.of_missing(place)
        differences = [self._checked(self._gradients.sums(contributions), expected, refutation.of_sum)]
        columns = [self._columns(sample, cotangents, own) for sample in self._samples]
        for sample, theirs in zip(self._samples, columns, strict=True):
            weights = torch.zeros(self._runs.batch_size, dtype=torch.float64)
            weights[sample.index] = 1
            ours = self._gradients.sums(contributions, weights)
            if not own and not self._is_sum(columns, cotangents, ours, theirs):
                self.notes.append(
                    "the loss in the model is no weighted sum over samples; only its gradient was checked"
                )
                break
            (wanted,) = theirs if own else [fitted(theirs, ours)]
            differences.append(self._checked(ours, wanted, partial(refutation.of_sample, sample.index)))
        if own:
            weights = self._weights()
            weighted = {n: self._samples[0].splits[n].scaled(v, weights) for n, v in cotangents.items()}
            expected = self._expected(values, weighted, [])
            sums = self._gradients.sums(contributions, weights)
            differences.append(self._checked(sums, expected, refutation.of_weights))
        return differences

    def _checked(
        self, found: list[Tensor], expected: list[Tensor], error: Callable[[Difference], Exception]
    ) -> Difference:
        difference = largest_difference(found, expected, self._tolerance)
        if difference.error > self._tolerance:
            raise error(difference)
        return difference

    def _weights(self) -> Tensor:
        """Random numbers of either sign, one per sample, none of them small."""
        generator = torch.Generator().manual_seed(self._runs.batch_size)
        size, sign = torch.rand(2, self._runs.batch_size, generator=generator, dtype=torch.float64, device="cpu")
        return (0.5 + size) * torch.where(sign < 0.5, -1, 1)

    def _expected(self, values: dict[int, Tensor], cotangents: dict[int, Tensor], shared: list[int]) -> list[Tensor]:
        """Autograd's gradients of an ordinary forward, whose outputs must be those of the captured one, `values`.

        With cotangents of the outputs `shared` too, less what these put on the others.
        """
        outputs = self._runs.forward()
        if len(outputs) <= max(values):
            raise Unprovable(f"it gave {len(outputs)} tensors when it was called once more, and more before")
        outputs = {n: outputs[n] for n in values}
        self._check_values(values, outputs)
        if not any(x.requires_grad for x in outputs.values()):
            raise NothingToProve("none of its outputs depends on trainable parameters")
        if self._runs.leaves_hooks_out and not self._runs.environment.is_equalising:
            self.outputs = _sketched(outputs)
        reached = self._gradients.reached(outputs, _with_shared(outputs, cotangents, shared))
        expected = self._gradients.filled(reached)
        if not math.isfinite(norm(expected)):
            raise NotFinite("the gradients of its outputs are not finite")
        self.has_zeros |= self._shows_nothing([each for each in reached if each is not None], norm(expected))
        return expected

    def _shows_nothing(self, gradients: list[Tensor], whole: float) -> bool:
        """Whether gradients are zero, or so small that an error would not be seen but larger than rounding of zero."""
        for each in gradients:
            size = norm([each])
            if size == 0 or 0.01 * torch.finfo(each.dtype).eps < size / whole <= self._tolerance**2:
                return True
        return False

    def _check_values(self, captured: dict[int, Tensor], outputs: dict[int, Tensor]) -> None:
        for n, output in outputs.items():
            got, want = captured[n], sketch(output, output)
            size = norm([want])
            error = norm([got - want]) if got.shape == want.shape else math.inf
            if error <= self._tolerance * size:
                continue
            unknown_draws = self._runs.environment.unknown_draws
            if unknown_draws:
                raise Unprovable(f"it draws random numbers in {', '.join(sorted(unknown_draws))}")
            raise Refutation(self._runs, self._tolerance).of_outputs(error / (size or 1))

    def _columns(self, sample: SampleForward, cotangents: dict[int, Tensor], own: bool) -> list[list[Tensor]]:
        """The gradients of a sample alone: of all its outputs together, or of each where all samples share them."""
        size, outputs = self._runs.batch_size, dict(enumerate(sample.outputs))
        of_sample = {n: sample.cotangent(n, v, size) for n, v in cotangents.items()}
        if own:
            return [self._gradients.of(outputs, of_sample)]
        return [self._gradients.of(outputs, {n: v}, retain_graph=True) for n, v in of_sample.items()]

    def _is_sum(
        self,
        columns: list[list[list[Tensor]]],
        cotangents: dict[int, Tensor],
        ours: list[Tensor],
        theirs: list[list[Tensor]],
    ) -> bool:
        """Whether a loss of the model is a weighted sum over the samples, whatever the weights.

        It is if the contribution of a sample is a multiple of the gradient of the sample alone, and also if the
        gradient of two samples combines those of each: then it is the capture that is wrong.
        """
        if self._are_combined(theirs, ours):
            return True
        pair = torch.tensor([sample.index for sample in self._samples])
        for reading in self._runs.arguments.readings(self._runs.batch_size):
            try:
                outputs = dict(enumerate(self._runs.forward(partial(reading, pair))))
            except Unprovable:
                continue
            if all(n in outputs and outputs[n].shape == v.shape for n, v in cotangents.items()):
                both = [column for each in columns for column in each]
                return self._are_combined(both, self._gradients.of(outputs, cotangents))
        return False

    def _are_combined(self, columns: list[list[Tensor]], gradients: list[Tensor]) -> bool:
        """Whether `gradients` are a linear combination of `columns`."""
        difference = largest_difference(fitted(columns, gradients), gradients, self._tolerance)
        return difference.error <= self._tolerance


def _sketched(outputs: dict[int, Tensor]) -> dict[int, Tensor]:
    return {n: sketch(x, x) for n, x in outputs.items()}


def _with_shared(outputs: dict[int, Tensor], cotangents: dict[int, Tensor], shared: list[int]) -> dict[int, Tensor]:
    """`cotangents` and those of the outputs `shared`, less what these put on the others."""
    others = {n: cotangent(outputs[n], n) for n in shared if outputs[n].requires_grad}
    places = [n for n in cotangents if outputs[n].requires_grad]
    if not others or not places:
        return cotangents
    # The output made last: other outputs may be on the way to it. Where there is another way to the shared outputs,
    # the comparison of one after the other is right.
    last = max(places, key=lambda n: outputs[n].grad_fn._sequence_nr() if outputs[n].grad_fn else -1)
    roots, vs = [outputs[n] for n in others], list(others.values())
    (through,) = torch.autograd.grad(roots, [outputs[last]], vs, retain_graph=True, allow_unused=True)
    less = {} if through is None else {last: cotangents[last] - through}
    return cotangents | less | others
