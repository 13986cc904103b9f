"""The proof that a capture gives every sample of a batch its own gradient, without the user's loss.

With random cotangents v of the outputs: (a) the contributions of the samples add up to autograd's gradient of <v, out>,
parameter by parameter; (b) those of a few samples are what autograd gives for each of them alone. No rule about shapes
or layers enters.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batch_norm import batch_norms
from ..reference import accumulate_dtype
from .alone import Alone, Reading, alone_in
from .captured import CapturedGradients
from .equal_draws import LowestPrecision
from .factors import Factor
from .precision import full_precision, is_autocast
from .runs import Runs
from .sketch import Difference, fitted, largest_difference, norm, sketch

if TYPE_CHECKING:
    from .taps import Tap

# The largest relative error that is rounding, by the lowest precision that takes part. On CUDA float32 may be TF32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
_REMEDIES = (
    "Capture the module in whose forward that happens as one unit, with rgd_ext.register_rule(type(module),"
    " rgd_ext.unit) before the capture; or give values that all samples share a leading dimension of 1, and name layers"
    " that take them with rgd_ext.mark(layer, batch_dim=None), those that take samples along another dimension with"
    " rgd_ext.mark(layer, batch_dim=...)"
)
_ANYHOW = "To train with it as it is, pass verify=False"


class Unprovable(Exception):  # noqa: N818
    """The proof cannot be carried out; the message says why.

    Attributes:
        output: of the captured forward, in a list, if it cannot be called another time.
    """

    output: list[object] | None = None


class Refused(Unprovable):
    """The captured forward raises, which is the cause."""


class BackwardFailed(Refused):
    """The captured backward raises, which is the cause."""


class NotFinite(Unprovable):
    """Infinite or undefined numbers, which may be others in the next call."""


class NothingToProve(Unprovable):
    """No output depends on parameters, or there are no samples."""


class Refuted(ValueError):  # noqa: N818
    """The capture gives wrong gradients."""


@dataclass(frozen=True)
class Verification:
    """What was proven of a captured model for one batch; printed, a line.

    Attributes:
        batch_size: B, or None where no tensor came in.
        parameters: how many were compared.
        samples: the numbers of those that were compared with autograd's gradients of them alone.
        largest_error: of all comparisons, relative to the norm of the parameter's gradient.
        where: the parameter with that error.
        tolerance: the error that would have been too large.
        seconds: the proof took.
        note: what could not be proven and why, or empty.
        outputs: sketches of the outputs, by their places among the tensors that the module gives, if there are hooks
            inside that did not run.
        has_zeros: whether gradients were zero, as behind weights that start with zero, so that they showed nothing.
    """

    batch_size: int | None
    parameters: int
    samples: tuple[int, ...]
    largest_error: float
    where: str
    tolerance: float
    seconds: float
    note: str = ""
    outputs: dict[int, Tensor] = field(default_factory=dict, repr=False)
    has_zeros: bool = False

    def __str__(self) -> str:
        alone = f", samples {' and '.join(map(str, self.samples))} of {self.batch_size} alone" if self.samples else ""
        text = (
            f"verified: {self.parameters} parameters{alone}; largest relative error {self.largest_error:.1e}"
            f" ('{self.where}', tolerance {self.tolerance:.0e}); {self.seconds:.3f} s"
        )
        return f"{text}. {self.note}" if self.note else text


class Proof:
    """The proof for one call of the module of `tap`, by `runs` of it."""

    def __init__(self, runs: Runs, tap: Tap, batch_norm: str) -> None:
        self._runs, self._tap, self._batch_norm = runs, tap, batch_norm
        self._names = list(runs.parameters.values())
        self._note, self._tolerance = "", 0.0
        self._outputs: dict[int, Tensor] = {}
        self._has_zeros = False

    def verification(self) -> Verification:
        """Carry it out.

        Raises:
            Refuted: if the capture is wrong, naming the parameter, the module, the error and a remedy.
            Unprovable: if that cannot be found out.
        """
        begin = time.perf_counter()
        if not self._names or self._runs.batch_size == 0:
            raise NothingToProve("it has no trainable parameters, or no samples")
        batch, alones = self._forwards()
        # Where samples have outputs of their own these tell them apart; otherwise the model gives its loss.
        fitting = [n for n in batch if not alones or all(n in alone.splits for alone in alones)]
        own = [n for n in fitting if alones and alones[0].splits[n] is not None]
        rest = [n for n in fitting if n not in own]
        if len(fitting) < len(batch):
            self._note = "Outputs that have no part for every sample were left out"
        if own:
            differences = [self._combined(batch, alones, own, rest)]
            if not differences[0].error <= self._tolerance:
                differences = self._compared(*self._forwards(), own, True)
                if rest:
                    differences += self._compared(*self._forwards(), rest, False)
        else:
            differences = self._compared(batch, alones, rest, False)
        worst = max(differences)
        return Verification(
            self._runs.batch_size,
            len(self._names),
            tuple(alone.sample for alone in alones) if len(differences) == 1 + len(alones) or own else (),
            worst.error,
            self._names[worst.index],
            self._tolerance,
            time.perf_counter() - begin,
            self._note,
            self._outputs,
            self._has_zeros,
        )

    def _forwards(self) -> tuple[dict[int, Tensor], list[Alone]]:
        """The captured outputs for the batch, by their places, and the ordinary ones for samples alone.

        The capture comes first: if the forward cannot be called again its output is the user's.
        """
        batch = self._captured_forward()
        if self._runs.is_random():
            del batch  # before there is another
            batch = self._captured_forward()
        output, self._draws_elsewhere = self._runs.output, self._runs.draws_elsewhere()
        tensors = [*batch.values(), *self._runs.parameters]
        self._tolerance = max(tolerance_of(x, not self._runs.lacks_autocast) for x in tensors)
        alones = self._alones(batch)
        if not alones:
            try:
                with torch.no_grad():
                    self._forward()
            except Unprovable as error:
                error.output = [output]
                raise
        return batch, alones

    def _captured_forward(self) -> dict[int, Tensor]:
        try:
            outputs = self._runs.forward(captured=True)
        except Refuted:
            raise
        except Exception as error:
            raise Refused(f"its captured forward raises {type(error).__name__}: {error}") from error
        if not outputs:
            raise Unprovable("there is no tensor among its outputs")
        batch = {n: x for n, x in enumerate(outputs) if x.is_floating_point()}
        if not batch:
            raise NothingToProve("none of its outputs holds real numbers")
        if not all(x.isfinite().all() for x in batch.values()):
            raise NotFinite("its outputs are not finite")
        return batch

    def _combined(self, batch: dict[int, Tensor], alones: list[Alone], own: list[int], rest: list[int]) -> Difference:
        """All at once, which as a rule is enough: a sum with random weights, and samples alone as large as the sum.

        Weights on the samples' contributions and on their cotangents are the same, as long as every sample has its own.
        Outputs `rest` of the whole batch must add nothing but what goes through the `own` outputs, as a loss of theirs.
        """
        size, weights = self._runs.batch_size, self._weights()
        cotangents = {n: _cotangent(batch[n], n) for n in own}
        factors = {alone.sample: (-1.3) ** n * size**0.5 for n, alone in enumerate(alones)}
        values = _sketched(batch)
        contributions = self._contributions(batch, cotangents)
        theirs = weights.clone()
        for sample, factor in factors.items():
            theirs[sample] += factor
        found = [self._sum(contributions.get(p), p, theirs) for p in self._runs.parameters]
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
        return self._difference(found, expected)

    def _compared(self, batch: dict[int, Tensor], alones: list[Alone], used: list[int], own: bool) -> list[Difference]:
        """One after the other: the sum over the samples, some of them, and all with random weights."""
        cotangents = {n: _cotangent(batch[n], n) for n in used}
        values = _sketched(batch)
        contributions = self._contributions(batch, cotangents)
        expected = self._expected(values, cotangents, [])
        differences = [self._checked_total(contributions, expected)]
        columns = [self._columns(alone, cotangents, own) for alone in alones]
        for alone, theirs in zip(alones, columns, strict=True):
            weights = torch.zeros(self._runs.batch_size, dtype=torch.float64)
            weights[alone.sample] = 1
            ours = [self._sum(contributions.get(p), p, weights) for p in self._runs.parameters]
            if not own and not self._is_sum(alones, columns, cotangents, ours, theirs):
                self._note = "The model's loss is no weighted sum over the samples; only its gradient was checked"
                break
            differences.append(self._checked_alone(alone, alones, ours, theirs[0] if own else fitted(theirs, ours)))
        if own:
            weights = self._weights()
            found = [self._sum(contributions.get(p), p, weights) for p in self._runs.parameters]
            weighted = {n: alones[0].splits[n].scaled(v, weights) for n, v in cotangents.items()}
            differences.append(self._checked_weighted(found, self._expected(values, weighted, []), alones))
        return differences

    def _weights(self) -> Tensor:
        """Random numbers of either sign, one per sample, none of them small."""
        generator = torch.Generator().manual_seed(self._runs.batch_size)
        size, sign = torch.rand(2, self._runs.batch_size, generator=generator, dtype=torch.float64)
        return (0.5 + size) * torch.where(sign < 0.5, -1, 1)

    def _expected(self, values: dict[int, Tensor], cotangents: dict[int, Tensor], rest: list[int]) -> list[Tensor]:
        """Autograd's gradients of an ordinary forward, whose outputs must be those of the captured one, `values`.

        With cotangents of the outputs `rest` too, less what these put on the others.
        """
        outputs = self._chosen(self._forward(), values)
        self._check_values(values, outputs)
        if not any(x.requires_grad for x in outputs.values()):
            raise NothingToProve("none of its outputs depends on trainable parameters")
        if self._runs.leaves_hooks_out and not self._runs.is_equalising:
            self._outputs = _sketched(outputs)
        others = {n: _cotangent(outputs[n], n) for n in rest if outputs[n].requires_grad}
        places = [n for n in cotangents if outputs[n].requires_grad]
        if others and places:
            # The last one made: others may be on the way to it. Where there is another way, one by one they are right.
            last = max(places, key=lambda n: outputs[n].grad_fn._sequence_nr() if outputs[n].grad_fn else -1)
            (through,) = torch.autograd.grad(
                [outputs[n] for n in others],
                [outputs[last]],
                list(others.values()),
                retain_graph=True,
                allow_unused=True,
            )
            less = {} if through is None else {last: cotangents[last] - through}
            cotangents = cotangents | less | others
        expected = self._grads(outputs, cotangents)
        if not math.isfinite(norm(expected)):
            raise NotFinite("the gradients of its outputs are not finite")
        self._has_zeros = self._has_zeros or self._runs.found_zeros
        return expected

    def _grads(self, outputs: dict[int, Tensor], cotangents: dict[int, Tensor], again: bool = False) -> list[Tensor]:
        pairs = [(outputs[n], v) for n, v in cotangents.items() if outputs[n].requires_grad]
        if not pairs:
            return [sketch(None, p) for p in self._runs.parameters]
        return self._runs.grads(*map(list, zip(*pairs, strict=True)), again)

    def _chosen(self, outputs: list[Tensor], values: dict[int, Tensor]) -> dict[int, Tensor]:
        if len(outputs) <= max(values):
            raise Unprovable(f"it gave {len(outputs)} tensors when it was called once more, and more before")
        return {n: outputs[n] for n in values}

    def _forward(self, reading: Reading | None = None, samples: Tensor | None = None) -> list[Tensor]:
        """Of an ordinary forward, for the whole batch or some samples of it."""
        try:
            return self._runs.forward(None if reading is None else reading(samples))
        except Exception as error:
            raise Unprovable(f"its forward cannot be called once more ({type(error).__name__}: {error})") from error

    def _alones(self, batch: dict[int, Tensor]) -> list[Alone]:
        """The first and the last sample by themselves; none where that proves nothing, or is not possible."""
        size = self._runs.batch_size
        if size is None:
            self._note = "No tensor among the arguments tells the samples apart; only the sum over all was checked"
        if size in (None, 1) or (self._batch_norm == "contribution" and self._has_batch_statistics()):
            return []
        try:
            found = [self._alone(batch, sample, size) for sample in (0, size - 1)]
        except Unprovable as reason:
            self._note = f"A sample alone cannot be compared: {reason}; only the sum over all was checked"
            return []
        if self._runs.unknown_draws:
            draws = ", ".join(sorted(self._runs.unknown_draws))
            self._note = f"The random numbers of {draws} depend on the batch; only the sum over samples was checked"
            return []
        return found

    def _has_batch_statistics(self) -> bool:
        layers = batch_norms(self._tap.module).values()
        return any(layer.training or layer.running_mean is None for layer in layers)

    def _alone(self, batch: dict[int, Tensor], sample: int, size: int) -> Alone:
        found: list[Alone] = []
        reason = Unprovable("no argument has as many rows as there are samples")
        # Where other libraries draw the random numbers, only copies in all places get the same.
        for count in [size] if self._draws_elsewhere else sorted({1, 2, size}):
            for reading in self._runs.readings(size):
                try:
                    outputs = self._forward(reading, torch.tensor([sample] * count))
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

    def _columns(self, alone: Alone, cotangents: dict[int, Tensor], own: bool) -> list[list[Tensor]]:
        """Gradients of a sample alone: of all its outputs together, or of each where all samples share them."""
        size, outputs = self._runs.batch_size, dict(enumerate(alone.outputs))
        of_sample = {n: alone.cotangent(n, v, size) for n, v in cotangents.items()}
        if own:
            return [self._grads(outputs, of_sample)]
        return [self._grads(outputs, {n: v}, again=True) for n, v in of_sample.items()]

    def _contributions(self, batch: dict[int, Tensor], cotangents: dict[int, Tensor]) -> dict[nn.Parameter, Factor]:
        """What the capture takes for the contributions of the samples. Lets go of the outputs."""
        places = [n for n in cotangents if batch[n].requires_grad]
        outputs = [batch[n] for n in places]
        batch.clear()
        if not places:
            return {}
        try:
            contributions = self._runs.contributions(outputs, [cotangents[n] for n in places])
        except Exception as error:
            if len(places) == 1:  # with several, the user's loss may not use the one that fails
                raise BackwardFailed(str(error)) from error
            raise Unprovable(f"the backward of all its outputs at once fails ({error})") from error
        for parameter, factor in contributions.items():
            if self._runs.batch_size not in (None, factor.batch_size):
                name = self._runs.parameters[parameter]
                raise Unprovable(f"'{name}' met {factor.batch_size} samples in a batch of another size")
        return contributions

    @torch.no_grad()
    def _sum(self, factor: Factor | None, parameter: nn.Parameter, weights: Tensor | None = None) -> Tensor:
        """The sketch of the sum over the samples, or of a weighted one."""
        if factor is None:
            return sketch(None, parameter)
        gradients = CapturedGradients([factor])
        with full_precision(parameter.device):
            if weights is None:
                return sketch(gradients.mean()[0], parameter)
            weights = (weights / gradients.batch_size).to(factor.example.device, accumulate_dtype(factor.example.dtype))
            return sketch(gradients.combine(weights)[0], parameter)

    def _check_values(self, captured: dict[int, Tensor], outputs: dict[int, Tensor]) -> None:
        for n, output in outputs.items():
            got, want = captured[n], sketch(output, output)
            size = norm([want])
            error = norm([got - want]) if got.shape == want.shape else math.inf
            if error <= self._tolerance * size:
                continue
            if self._runs.unknown_draws:
                raise Unprovable(f"it draws random numbers in {', '.join(sorted(self._runs.unknown_draws))}")
            raise self._refutation(
                f"module '{self._tap.name}' ({type(self._tap.module).__name__}) gives other outputs when it is"
                f" captured, with a relative error of {error / (size or 1):.2g}: a module inside takes an argument that"
                f" all samples share for one with samples. {_REMEDIES}. {_ANYHOW}",
                error / (size or 1),
            )

    def _difference(self, found: list[Tensor], expected: list[Tensor]) -> Difference:
        return largest_difference(found, expected, self._tolerance)

    def _checked_total(self, contributions: dict[nn.Parameter, Factor], expected: list[Tensor]) -> Difference:
        for place, parameter in enumerate(self._runs.parameters):
            if parameter not in contributions and norm([expected[place]]):
                raise self._refutation(
                    f"{self._parameter(place)} gets no per-sample gradient (a relative error of 1), but the outputs"
                    " depend on it: the way from it to them goes past the capture, through an autograd.Function for"
                    " example (as part of a unit it needs setup_context and generate_vmap_rule), or a value kept from"
                    f" another call. {_REMEDIES}. {_ANYHOW}",
                    1.0,
                )
        found = [self._sum(contributions.get(p), p) for p in self._runs.parameters]
        difference = self._difference(found, expected)
        if difference.error > self._tolerance:
            raise self._refutation(
                f"{self._parameter(difference.index)} would get a gradient with a relative error of"
                f" {difference.error:.2g}: the samples' contributions do not add up to it. {_REMEDIES}. {_ANYHOW}",
                difference.error,
            )
        return difference

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
        if self._difference(ours, fitted(theirs, ours)).error <= self._tolerance:
            return True
        pair = torch.tensor([alone.sample for alone in alones])
        for reading in self._runs.readings(self._runs.batch_size):
            try:
                outputs = dict(enumerate(self._forward(reading, pair)))
            except Unprovable:
                continue
            if any(n not in outputs or outputs[n].shape != v.shape for n, v in cotangents.items()):
                continue
            expected = self._grads(outputs, cotangents)
            everything = [column for each in columns for column in each]
            return self._difference(fitted(everything, expected), expected).error <= self._tolerance
        return False

    def _checked_alone(
        self, alone: Alone, alones: list[Alone], found: list[Tensor], expected: list[Tensor]
    ) -> Difference:
        difference = self._difference(found, expected)
        if difference.error > self._tolerance:
            raise self._refutation(
                f"{self._parameter(difference.index)}: the per-sample gradient of sample {alone.sample} of"
                f" {self._runs.batch_size} has a relative error of {difference.error:.2g} against the gradient of the"
                f" sample alone: {self._why(alones)}. {_ANYHOW}",
                difference.error,
            )
        return difference

    def _checked_weighted(self, found: list[Tensor], expected: list[Tensor], alones: list[Alone]) -> Difference:
        difference = self._difference(found, expected)
        if difference.error > self._tolerance:
            raise self._refutation(
                f"{self._parameter(difference.index)}: the per-sample gradients do not follow their own samples, with a"
                f" relative error of {difference.error:.2g}: {self._why(alones)}. {_ANYHOW}",
                difference.error,
            )
        return difference

    def _why(self, alones: list[Alone]) -> str:
        difference = max(alone.difference for alone in alones)
        if difference > self._tolerance:
            return (
                f"the forward mixes samples, since the outputs for one change by {difference:.2g} without the others."
                " Keep sums, statistics, shuffles and attention within each sample (for batch normalisation see"
                " rgd_ext.convert_batch_norm)"
            )
        return (
            "the capture credits samples with what belongs to others, since the forward moves them to other places, or"
            f" has a dimension that is as large as the batch by chance. {_REMEDIES}"
        )

    def _refutation(self, message: str, error: float) -> Refuted | Unprovable:
        """What a relative error means, unless outputs change from call to call, or rounding is as large."""
        lowest = LowestPrecision()
        with lowest:
            first = self._forward()
        second = self._forward()
        if len(first) != len(second) or any(
            norm([sketch(a, a) - sketch(b, b)]) > self._tolerance * norm([sketch(a, a)])
            for a, b in zip(first, second, strict=True)
            if a.is_floating_point()
        ):
            return Unprovable("its outputs change from call to call, with the same random numbers")
        size = 16 * torch.finfo(lowest.dtype).eps
        tolerance = max(self._tolerance, TOLERANCE.get(lowest.dtype, 0.0), 3 * self._noise(second, size))
        return Refuted(message) if error > tolerance else Unprovable("its gradients hold too much rounding to compare")

    def _noise(self, outputs: list[Tensor], size: float) -> float:
        """How much gradients change if the arguments do by a relative `size`."""
        places = [n for n, x in enumerate(outputs) if x.requires_grad and x.is_floating_point()]
        cotangents = {n: _cotangent(outputs[n], n) for n in places}
        ordinary = self._grads(dict(enumerate(outputs)), cotangents)
        outputs = self._runs.forward(self._runs.with_noise(size))
        return self._difference(self._grads(dict(enumerate(outputs)), cotangents), ordinary).error

    def _parameter(self, place: int) -> str:
        name = self._names[place]
        owner = name.rpartition(".")[0]
        kind = type(self._tap.module.get_submodule(owner)).__name__
        return f"parameter '{name}' of module '{owner or self._tap.name}' ({kind})"


def _sketched(outputs: dict[int, Tensor]) -> dict[int, Tensor]:
    return {n: sketch(x, x) for n, x in outputs.items()}


def _cotangent(output: Tensor, number: int) -> Tensor:
    """Random numbers of the shape of `output`, with a norm of about one per sample."""
    generator = torch.Generator(output.device).manual_seed(number)
    dtype = torch.promote_types(output.dtype, torch.float)
    v = torch.randn(output.shape, generator=generator, dtype=dtype, device=output.device)
    return v.div_(max(1, output.shape[1:].numel()) ** 0.5).to(output.dtype)


def tolerance_of(x: Tensor, autocast: bool) -> float:
    """The largest relative error of `x` that is rounding, where autocast may be at work."""
    if autocast and is_autocast(x.device.type):
        return TOLERANCE[torch.get_autocast_dtype(x.device.type)]
    is_tf32 = x.is_cuda and x.dtype == torch.float32
    return TOLERANCE[torch.float16 if is_tf32 else x.dtype]
