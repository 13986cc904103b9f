"""The proof that a capture gives every sample of a batch its own gradient, without the user's loss.

With random cotangents v of the outputs: (a) the contributions of the samples add up to autograd's gradient of <v, out>,
parameter by parameter; (b) those of a few samples are what autograd gives for each of them alone. No rule about shapes
or layers enters.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batch_norm import batch_norms
from ..reference import accumulate_dtype
from .alone import Alone, Reading, alone_in
from .captured import CapturedGradients
from .factors import Factor
from .precision import full_precision
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
    """

    batch_size: int | None
    parameters: int
    samples: tuple[int, ...]
    largest_error: float
    where: str
    tolerance: float
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        alone = f", samples {' and '.join(map(str, self.samples))} of {self.batch_size} alone" if self.samples else ""
        text = (
            f"verified: {self.parameters} parameters{alone}; largest relative error {self.largest_error:.1e}"
            f" ('{self.where}', tolerance {self.tolerance:.0e}); {self.seconds:.3f} s"
        )
        return f"{text}. {self.note}" if self.note else text


class Proof:
    """The proof for one call of the module of `tap`, by `runs` of it.

    Attributes:
        values: the norms of the outputs, by their places among the tensors that the module gives; none where they
            depend on random numbers.
    """

    def __init__(self, runs: Runs, tap: Tap, batch_norm: str) -> None:
        self._runs, self._tap, self._batch_norm = runs, tap, batch_norm
        self._names = list(runs.parameters.values())
        self._note, self._tolerance = "", 0.0
        self.values: dict[int, float] = {}

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
        own = [n for n in batch if alones and alones[0].splits[n] is not None]
        rest = [n for n in batch if n not in own]
        differences, is_complete = [], False
        if own:
            difference, is_complete = self._combined(batch, alones, own)
            differences = [difference]
            if not difference.error <= self._tolerance:
                differences = self._compared(*self._forwards(), own, True)
        if rest and not is_complete:
            differences += self._compared(*(self._forwards() if own else (batch, alones)), rest, False)
        worst = max(differences)
        return Verification(
            self._runs.batch_size,
            len(self._names),
            () if self._note else tuple(alone.sample for alone in alones),
            worst.error,
            self._names[worst.index],
            self._tolerance,
            time.perf_counter() - begin,
            self._note,
        )

    def _forwards(self) -> tuple[dict[int, Tensor], list[Alone]]:
        """The captured outputs for the batch, by their places, and the ordinary ones for samples alone.

        The capture comes first: if the forward cannot be called again its output is the user's.
        """
        batch = self._captured_forward()
        if self._runs.is_random():
            batch = self._captured_forward()
        output = self._runs.output
        self._tolerance = max(map(_tolerance_of, [*batch.values(), *self._runs.parameters]))
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
            raise Unprovable("its outputs are not finite")
        return batch

    def _combined(self, batch: dict[int, Tensor], alones: list[Alone], used: list[int]) -> tuple[Difference, bool]:
        """All at once, which as a rule is enough: a weighted sum over the samples that gives some of them more weight.

        Returns:
            The difference, and whether the outputs `used` depend on all parameters.
        """
        silent = self._silent(alones)
        cotangents = self._cotangents(batch, used, alones, silent)
        # What a sample alone and what silent samples add is as large as the sum.
        factors = {alone.sample: (-1.3) ** n * self._runs.batch_size**0.5 for n, alone in enumerate(alones)}
        weights = 1 + self._runs.batch_size**0.5 * silent
        for sample, factor in factors.items():
            weights[sample] += factor
        values = _sketched(batch)
        contributions = self._contributions(batch, cotangents)
        found = [self._sum(contributions.get(p), p, weights) for p in self._runs.parameters]
        missing = [p not in contributions for p in self._runs.parameters]
        del contributions
        expected = self._expected(values, cotangents)
        is_complete = all(norm([each]) for each in expected)
        if any(is_missing and norm([each]) for is_missing, each in zip(missing, expected, strict=True)):
            return Difference(math.inf, 0), is_complete
        for alone in alones:
            (of_sample,) = self._columns(alone, cotangents, True)
            expected = [e + factors[alone.sample] * h for e, h in zip(expected, of_sample, strict=True)]
        return self._difference(found, expected), is_complete

    def _compared(self, batch: dict[int, Tensor], alones: list[Alone], used: list[int], own: bool) -> list[Difference]:
        """One after the other: the sum over the samples, some of them, and those that must not contribute."""
        silent = self._silent(alones if own else [])
        cotangents = self._cotangents(batch, used, alones, silent)
        values = _sketched(batch)
        contributions = self._contributions(batch, cotangents)
        expected = self._expected(values, cotangents)
        differences = [self._checked_total(contributions, expected)]
        samples = [alone.sample for alone in alones]
        columns = [self._columns(alone, cotangents, own) for alone in alones]
        for alone, theirs in zip(alones, columns, strict=True):
            weights = torch.zeros(self._runs.batch_size, dtype=torch.float64)
            weights[alone.sample] = 1
            ours = [self._sum(contributions.get(p), p, weights) for p in self._runs.parameters]
            if not own and not self._is_sum(samples, columns, cotangents, ours, theirs):
                self._note = "The model's loss is no weighted sum over the samples; only its gradient was checked"
                break
            differences.append(self._checked_alone(alone, ours, theirs[0] if own else fitted(theirs, ours)))
        if silent.any():
            found = [self._sum(contributions.get(p), p, silent) for p in self._runs.parameters]
            self._check_silent(found, expected, alones)
        return differences

    def _silent(self, alones: list[Alone]) -> Tensor:
        """Random weights of every other sample, zero for the rest: those get no cotangent, so they contribute nothing.

        So a sample that gets what belongs to another one is found wherever it is.
        """
        weights = torch.zeros(self._runs.batch_size if alones else 0, dtype=torch.float64)
        weights[1::2] = torch.randn(len(weights[1::2]), generator=torch.Generator().manual_seed(0), dtype=weights.dtype)
        for alone in alones:
            weights[alone.sample] = 0
        return weights

    def _cotangents(
        self, batch: dict[int, Tensor], used: list[int], alones: list[Alone], silent: Tensor
    ) -> dict[int, Tensor]:
        cotangents = {n: _cotangent(batch[n], n) for n in used}
        if silent.any():
            for n, v in cotangents.items():
                alones[0].splits[n].scale(v, silent == 0)
        return cotangents

    def _expected(self, values: dict[int, Tensor], cotangents: dict[int, Tensor]) -> list[Tensor]:
        """Autograd's gradients of an ordinary forward, whose outputs must be those of the captured one, `values`."""
        outputs = self._chosen(self._forward(), values)
        if not self._runs.is_equalising:
            self.values = {n: x.detach().double().norm().item() for n, x in outputs.items()}
        self._check_values(values, outputs)
        if not any(x.requires_grad for x in outputs.values()):
            raise NothingToProve("none of its outputs depends on trainable parameters")
        expected = self._grads(outputs, cotangents)
        if not math.isfinite(norm(expected)):
            raise Unprovable("the gradients of its outputs are not finite")
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
        for count in sorted({1, 2, size}):
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
        pairs = [(batch[n], v) for n, v in cotangents.items() if batch[n].requires_grad]
        batch.clear()
        if not pairs:
            return {}
        try:
            contributions = self._runs.contributions(*map(list, zip(*pairs, strict=True)))
        except Exception as error:
            if len(pairs) == 1:  # with several, the user's loss may not use the one that fails
                raise
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
            raise Refuted(
                f"module '{self._tap.name}' ({type(self._tap.module).__name__}) gives other outputs when it is"
                f" captured, with a relative error of {error / (size or 1):.2g}: a module inside takes an argument that"
                f" all samples share for one with samples. {_REMEDIES}. {_ANYHOW}"
            )

    def _difference(self, found: list[Tensor], expected: list[Tensor]) -> Difference:
        return largest_difference(found, expected, self._tolerance**0.5)

    def _checked_total(self, contributions: dict[nn.Parameter, Factor], expected: list[Tensor]) -> Difference:
        for place, parameter in enumerate(self._runs.parameters):
            if parameter not in contributions and norm([expected[place]]):
                raise Refuted(
                    f"{self._parameter(place)} gets no per-sample gradient (a relative error of 1), but the outputs"
                    " depend on it: the way from it to them goes past the capture, through an autograd.Function for"
                    f" example, or a value kept from another call. {_REMEDIES}. {_ANYHOW}"
                )
        found = [self._sum(contributions.get(p), p) for p in self._runs.parameters]
        difference = self._difference(found, expected)
        if difference.error > self._tolerance:
            raise Refuted(
                f"{self._parameter(difference.index)} would get a gradient with a relative error of"
                f" {difference.error:.2g}: the contributions of the samples do not add up to it. {_REMEDIES}. {_ANYHOW}"
            )
        return difference

    def _is_sum(
        self,
        samples: list[int],
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
        for reading in self._runs.readings(self._runs.batch_size):
            try:
                outputs = self._forward(reading, torch.tensor(samples))
            except Unprovable:
                continue
            expected = self._grads(dict(enumerate(outputs)), cotangents)
            everything = [column for each in columns for column in each]
            return self._difference(fitted(everything, expected), expected).error <= self._tolerance
        return False

    def _checked_alone(self, alone: Alone, found: list[Tensor], expected: list[Tensor]) -> Difference:
        difference = self._difference(found, expected)
        if difference.error > self._tolerance:
            raise Refuted(
                f"{self._parameter(difference.index)}: the per-sample gradient of sample {alone.sample} of"
                f" {self._runs.batch_size} has a relative error of {difference.error:.2g} against the gradient of the"
                f" sample alone: {self._why([alone])}. {_ANYHOW}"
            )
        return difference

    def _check_silent(self, found: list[Tensor], expected: list[Tensor], alones: list[Alone]) -> None:
        errors = [norm([each]) / (norm(expected) or 1.0) for each in found]
        error = max(errors)
        if error > self._tolerance:
            raise Refuted(
                f"{self._parameter(errors.index(error))}: samples whose outputs have no part in the loss get per-sample"
                f" gradients all the same, with a relative error of {error:.2g}: {self._why(alones)}. {_ANYHOW}"
            )

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


def _tolerance_of(x: Tensor) -> float:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return TOLERANCE[torch.get_autocast_dtype(kind)]
    is_tf32 = x.is_cuda and x.dtype == torch.float32
    return TOLERANCE[torch.float16 if is_tf32 else x.dtype]
