"""The proof that a capture gives every sample of a batch its own gradient, without the user's loss.

With random cotangents v of the outputs: (a) the contributions of the samples add up to autograd's gradient of <v, out>,
parameter by parameter; (b) those of a few samples are what autograd gives for each of them alone. No rule about shapes
or layers enters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from ..batch_norm import batch_norms
from ..reference import accumulate_dtype
from .alone import Alone, alone_in
from .batch import ONE_AT_A_TIME
from .captured import CapturedGradients
from .factors import Factor
from .findings import (
    ForwardFailed,
    NotFinite,
    NothingToProve,
    NotRepeatable,
    Unprovable,
    Verification,
    WrongGradients,
    tolerance_of,
)
from .precision import full_precision
from .refutation import Refutation
from .runs import Runs, cotangent
from .sketch import Difference, fitted, largest_difference, norm, sketch

# Of outputs that are neither losses nor of each sample.
_JOINED = (
    "its outputs have no part for each sample. If the arguments hold several samples in one tensor, as graphs that are"
    f" joined, {ONE_AT_A_TIME}"
)


class Proof:
    """The proof for one call of a captured module, by `runs` of it."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._notes: list[str] = []
        self._tolerance = 0.0
        self._draws_elsewhere = self._has_zeros = False
        self._outputs: dict[int, Tensor] = {}

    def verification(self) -> Verification:
        """Carry it out.

        Raises:
            WrongGradients: if the capture is wrong, naming the parameter, the module, the error and a remedy.
            Unprovable: if that cannot be found out.
        """
        begin = time.perf_counter()
        if not self._runs.parameters or self._runs.batch_size == 0:
            raise NothingToProve("it has no trainable parameters, or no samples")
        batch, alones = self._forwards()
        # Where samples have outputs of their own these tell them apart; otherwise the model gives its loss.
        fitting = [n for n in batch if not alones or all(n in alone.splits for alone in alones)]
        own = [n for n in fitting if alones and alones[0].splits[n] is not None]
        rest = [n for n in fitting if n not in own]
        if len(fitting) < len(batch):
            self._notes.append("outputs that have no part for every sample were left out")
        if own:
            differences = [self._combined(batch, alones, own, rest)]
            if not differences[0].error <= self._tolerance:
                differences = self._compared(*self._forwards(), own, True)
                if rest:
                    differences += self._compared(*self._forwards(), rest, False)
        else:
            if alones and any(batch[n].ndim > 1 for n in rest):
                self._notes.append(_JOINED)
            differences = self._compared(batch, alones, rest, False)
        worst = max(differences, key=attrgetter("error"))
        return Verification(
            batch_size=self._runs.batch_size,
            parameters=len(self._runs.parameters),
            samples=tuple(alone.sample for alone in alones) if own or len(differences) == 1 + len(alones) else (),
            largest_error=worst.error,
            where=self._runs.name_of(worst.index),
            tolerance=self._tolerance,
            seconds=time.perf_counter() - begin,
            note="; ".join(dict.fromkeys(self._notes)),
            outputs=self._outputs,
            is_open=self._has_zeros or self._runs.has_other_side,
        )

    def _forwards(self) -> tuple[dict[int, Tensor], list[Alone]]:
        """The captured outputs for the batch, by their places, and the ordinary ones for samples alone.

        The capture comes first: if the forward cannot be called again its output is the user's.
        """
        batch = self._captured_forward()
        if self._runs.is_random():
            del batch  # before there is another
            batch = self._captured_forward()
        output, self._draws_elsewhere = self._runs.faithful_output(), self._runs.draws_elsewhere()
        tensors = [*batch.values(), *self._runs.parameters]
        self._tolerance = max(tolerance_of(x, not self._runs.lacks_autocast) for x in tensors)
        alones = self._alones(batch)
        if not alones:
            try:
                with torch.no_grad():
                    self._runs.forward()
            except NotRepeatable as error:
                error.output = output
                raise
        return batch, alones

    def _captured_forward(self) -> dict[int, Tensor]:
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

    def _alones(self, batch: dict[int, Tensor]) -> list[Alone]:
        """The first and the last sample by themselves; none where that proves nothing, or is not possible."""
        size = self._runs.batch_size
        if size is None:
            self._notes.append("no tensor among the arguments tells the samples apart; only the sum was checked")
        if size in (None, 1) or self._has_batch_statistics():
            return []
        try:
            found = [self._alone(batch, sample, size) for sample in (0, size - 1)]
        except Unprovable as reason:
            self._notes.append(f"a sample alone cannot be compared: {reason}; only the sum over all was checked")
            return []
        if self._runs.unknown_draws:
            draws = ", ".join(sorted(self._runs.unknown_draws))
            self._notes.append(f"the random numbers of {draws} depend on the batch; only the sum over all was checked")
            return []
        return found

    def _has_batch_statistics(self) -> bool:
        layers = batch_norms(self._runs.module).values()
        return any(layer.training or layer.running_mean is None for layer in layers)

    def _alone(self, batch: dict[int, Tensor], sample: int, size: int) -> Alone:
        found: list[Alone] = []
        reason = Unprovable("no argument has as many rows as there are samples")
        # Where other libraries draw the random numbers, only copies in all places get the same.
        for count in [size] if self._draws_elsewhere else sorted({1, 2, size}):
            for reading in self._runs.readings(size):
                try:
                    outputs = self._runs.forward(partial(reading, torch.tensor([sample] * count)))
                    alone = alone_in(batch, sample, size, outputs, count)
                except Unprovable as error:
                    reason = error
                    continue
                if alone is None:
                    reason = Unprovable("its outputs have other dimensions")
                elif alone.difference <= self._tolerance:
                    return alone
                else:
                    found.append(alone)
        if not found:
            raise reason
        return min(found, key=lambda alone: (alone.difference == math.inf, alone.count))

    def _combined(self, batch: dict[int, Tensor], alones: list[Alone], own: list[int], rest: list[int]) -> Difference:
        """All at once, which as a rule is enough: a sum with random weights, and samples alone as large as the sum.

        Weights on the samples' contributions and on their cotangents are the same, as long as every sample has its own.
        Outputs `rest` of the whole batch must add nothing but what goes through the `own` outputs, as a loss of theirs.
        """
        size, weights = self._runs.batch_size, self._weights()
        cotangents = {n: cotangent(batch[n], n) for n in own}
        factors = {alone.sample: (-1.3) ** n * size**0.5 for n, alone in enumerate(alones)}
        values = _sketched(batch)
        contributions = self._runs.contributions(batch, cotangents)
        of_samples = weights.clone()
        for sample, factor in factors.items():
            of_samples[sample] += factor
        found = self._sums(contributions, of_samples)
        missing = [p not in contributions for p in self._runs.parameters]
        del contributions
        for n, v in cotangents.items():
            v.copy_(alones[0].splits[n].scaled(v, weights))
        expected = self._expected(values, cotangents, rest)
        if any(is_missing and norm([each]) for is_missing, each in zip(missing, expected, strict=True)):
            return Difference(math.inf, 0)
        for alone in alones:
            (weighted,) = self._columns(alone, cotangents, True)
            factor = factors[alone.sample] / weights[alone.sample].item()
            expected = [e + factor * h for e, h in zip(expected, weighted, strict=True)]
        return largest_difference(found, expected, self._tolerance)

    def _compared(self, batch: dict[int, Tensor], alones: list[Alone], used: list[int], own: bool) -> list[Difference]:
        """One after the other: the sum over the samples, some of them, and all with random weights."""
        refutation = Refutation(self._runs, self._tolerance, alones)
        cotangents = {n: cotangent(batch[n], n) for n in used}
        values = _sketched(batch)
        contributions = self._runs.contributions(batch, cotangents)
        expected = self._expected(values, cotangents, [])
        for place, parameter in enumerate(self._runs.parameters):
            if parameter not in contributions and norm([expected[place]]):
                raise refutation.of_missing(place)
        differences = [self._checked(self._sums(contributions), expected, refutation.of_sum)]
        columns = [self._columns(alone, cotangents, own) for alone in alones]
        for alone, theirs in zip(alones, columns, strict=True):
            weights = torch.zeros(self._runs.batch_size, dtype=torch.float64)
            weights[alone.sample] = 1
            ours = self._sums(contributions, weights)
            if not own and not self._is_sum(alones, columns, cotangents, ours, theirs):
                self._notes.append(
                    "the loss in the model is no weighted sum over samples; only its gradient was checked"
                )
                break
            (wanted,) = theirs if own else [fitted(theirs, ours)]
            differences.append(self._checked(ours, wanted, partial(refutation.of_sample, alone.sample)))
        if own:
            weights = self._weights()
            weighted = {n: alones[0].splits[n].scaled(v, weights) for n, v in cotangents.items()}
            expected = self._expected(values, weighted, [])
            differences.append(self._checked(self._sums(contributions, weights), expected, refutation.of_weights))
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

    def _expected(self, values: dict[int, Tensor], cotangents: dict[int, Tensor], rest: list[int]) -> list[Tensor]:
        """Autograd's gradients of an ordinary forward, whose outputs must be those of the captured one, `values`.

        With cotangents of the outputs `rest` too, less what these put on the others.
        """
        outputs = self._runs.forward()
        if len(outputs) <= max(values):
            raise Unprovable(f"it gave {len(outputs)} tensors when it was called once more, and more before")
        outputs = {n: outputs[n] for n in values}
        self._check_values(values, outputs)
        if not any(x.requires_grad for x in outputs.values()):
            raise NothingToProve("none of its outputs depends on trainable parameters")
        if self._runs.leaves_hooks_out and not self._runs.is_equalising:
            self._outputs = _sketched(outputs)
        expected = self._runs.grads(outputs, _with_rest(outputs, cotangents, rest))
        if not math.isfinite(norm(expected)):
            raise NotFinite("the gradients of its outputs are not finite")
        self._has_zeros |= self._shows_nothing(expected)
        return expected

    def _shows_nothing(self, gradients: list[Tensor]) -> bool:
        """Whether gradients are zero, or so small that an error would not be seen but larger than rounding of zero."""
        whole = norm(gradients)
        for is_reached, each in zip(self._runs.reached, gradients, strict=True):
            size = norm([each])
            if is_reached and (size == 0 or 0.01 * torch.finfo(each.dtype).eps < size / whole <= self._tolerance**2):
                return True
        return False

    def _check_values(self, captured: dict[int, Tensor], outputs: dict[int, Tensor]) -> None:
        for n, output in outputs.items():
            got, want = captured[n], sketch(output, output)
            size = norm([want])
            error = norm([got - want]) if got.shape == want.shape else math.inf
            if error <= self._tolerance * size:
                continue
            if self._runs.unknown_draws:
                raise Unprovable(f"it draws random numbers in {', '.join(sorted(self._runs.unknown_draws))}")
            raise Refutation(self._runs, self._tolerance).of_outputs(error / (size or 1))

    def _columns(self, alone: Alone, cotangents: dict[int, Tensor], own: bool) -> list[list[Tensor]]:
        """Gradients of a sample alone: of all its outputs together, or of each where all samples share them."""
        size, outputs = self._runs.batch_size, dict(enumerate(alone.outputs))
        of_sample = {n: alone.cotangent(n, v, size) for n, v in cotangents.items()}
        if own:
            return [self._runs.grads(outputs, of_sample)]
        return [self._runs.grads(outputs, {n: v}, retain_graph=True) for n, v in of_sample.items()]

    @torch.no_grad()
    def _sums(self, contributions: dict[nn.Parameter, Factor], weights: Tensor | None = None) -> list[Tensor]:
        """Sketches of the parameters' sums over the samples, or of weighted ones."""

        def of(parameter: nn.Parameter, factor: Factor | None) -> Tensor:
            if factor is None:
                return sketch(None, parameter)
            gradients, x = CapturedGradients([factor]), factor.example
            with full_precision(parameter.device):
                if weights is None:
                    return sketch(gradients.mean()[0], parameter)
                shares = (weights / gradients.batch_size).to(x.device, accumulate_dtype(x.dtype))
                return sketch(gradients.combine(shares)[0], parameter)

        return [of(parameter, contributions.get(parameter)) for parameter in self._runs.parameters]

    def _is_sum(
        self,
        alones: list[Alone],
        columns: list[list[list[Tensor]]],
        cotangents: dict[int, Tensor],
        ours: list[Tensor],
        theirs: list[list[Tensor]],
    ) -> bool:
        """Whether a loss of the model is a weighted sum over the samples, whatever the weights.

        It is if the contribution of a sample is a multiple of the gradient of the sample alone, and also if the
        gradient of two samples combines those of each: then it is the capture that is wrong.
        """

        def is_combined(columns: list[list[Tensor]], gradients: list[Tensor]) -> bool:
            difference = largest_difference(fitted(columns, gradients), gradients, self._tolerance)
            return difference.error <= self._tolerance

        if is_combined(theirs, ours):
            return True
        pair = torch.tensor([alone.sample for alone in alones])
        for reading in self._runs.readings(self._runs.batch_size):
            try:
                outputs = dict(enumerate(self._runs.forward(partial(reading, pair))))
            except Unprovable:
                continue
            if all(n in outputs and outputs[n].shape == v.shape for n, v in cotangents.items()):
                both = [column for each in columns for column in each]
                return is_combined(both, self._runs.grads(outputs, cotangents))
        return False


def _sketched(outputs: dict[int, Tensor]) -> dict[int, Tensor]:
    return {n: sketch(x, x) for n, x in outputs.items()}


def _with_rest(outputs: dict[int, Tensor], cotangents: dict[int, Tensor], rest: list[int]) -> dict[int, Tensor]:
    """`cotangents` and those of the outputs `rest`, less what these put on the others."""
    others = {n: cotangent(outputs[n], n) for n in rest if outputs[n].requires_grad}
    places = [n for n in cotangents if outputs[n].requires_grad]
    if not others or not places:
        return cotangents
    # The last one made: others may be on the way to it. Where there is another way, one by one they are right.
    last = max(places, key=lambda n: outputs[n].grad_fn._sequence_nr() if outputs[n].grad_fn else -1)
    roots, vs = [outputs[n] for n in others], list(others.values())
    (through,) = torch.autograd.grad(roots, [outputs[last]], vs, retain_graph=True, allow_unused=True)
    less = {} if through is None else {last: cotangents[last] - through}
    return cotangents | less | others
