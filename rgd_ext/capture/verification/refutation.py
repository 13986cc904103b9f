"""What the user reads where the proof of a capture finds a mismatch, if it is none of rounding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..batch import LISTED, ONE_AT_A_TIME
from ..findings import TOLERANCE, Unprovable, WrongGradients
from ..modes import uncompiled
from ..precision import LowestPrecision
from .gradients import cotangent
from .runs import Runs
from .sample_forward import SampleForward
from .sketch import Difference, largest_difference, norm, sketch

_REMEDIES = (
    "Capture the module whose forward does this as one unit, with rgd_ext.register_rule(module, rgd_ext.unit)"
    " before the capture; or give values that all samples share a leading dimension of 1, and name layers"
    " that take them with rgd_ext.mark(layer, batch_dim=None), those that take samples along another dimension with"
    " rgd_ext.mark(layer, batch_dim=...)"
)


class Refutation:
    """Makes the error for each kind of mismatch: `WrongGradients`, or `Unprovable` where it may be rounding.

    Args:
        runs: of the call.
        tolerance: the largest relative error that is rounding, as far as outputs and parameters show.
        samples: the forwards of samples alone that were compared.
    """

    def __init__(self, runs: Runs, tolerance: float, samples: Sequence[SampleForward] = ()) -> None:
        self._runs, self._tolerance, self._samples = runs, tolerance, samples

    def of_outputs(self, error: float) -> Exception:
        """The captured outputs are others than those of the module itself."""
        recorder = self._runs.call.recorder
        return self._error(
            f"module '{recorder.name}' ({type(recorder.module).__name__}) gives other outputs when it is captured,"
            f" with a relative error of {error:.2g}: probably a module inside takes an argument that all samples share"
            f" for one with samples. {_REMEDIES}",
            error,
        )

    def of_missing(self, index: int) -> Exception:
        """A parameter has a gradient, but no contributions."""
        return self._error(
            f"{self._parameter(index)} gets no per-sample gradient (a relative error of 1), but the outputs depend on"
            " it in a way that the capture does not see: through an autograd.Function, for example (part of a unit,"
            " it is fast with setup_context and generate_vmap_rule only), or a value kept from another call."
            f" {_REMEDIES}",
            1.0,
        )

    def of_sum(self, found: Difference) -> Exception:
        """The contributions of all samples do not add up to the gradient."""
        return self._error(
            f"{self._parameter(found.index)} would get a gradient with a relative error of {found.error:.2g}: the"
            f" samples' contributions do not add up to it. {_REMEDIES}",
            found.error,
        )

    def of_sample(self, sample: int, found: Difference) -> Exception:
        """The contribution of a sample is not its gradient alone."""
        return self._error(
            f"{self._parameter(found.index)}: the per-sample gradient of sample {sample} of {self._runs.batch_size} has"
            f" a relative error of {found.error:.2g} against the gradient of the sample alone: {self._cause()}",
            found.error,
        )

    def of_weights(self, found: Difference) -> Exception:
        """Contributions with weights are not the gradient of samples with these weights."""
        return self._error(
            f"{self._parameter(found.index)}: the per-sample gradients do not follow their own samples, with a relative"
            f" error of {found.error:.2g}: {self._cause()}",
            found.error,
        )

    def _parameter(self, index: int) -> str:
        name = self._runs.gradients.name_of(index)
        owner = name.rpartition(".")[0]
        call = self._runs.call
        kind = type(call.context.model.get_submodule(owner)).__name__
        return f"parameter '{name}' of module '{owner or call.recorder.name}' ({kind})"

    def _cause(self) -> str:
        difference = max(sample.difference for sample in self._samples)
        if difference > self._tolerance:
            of_one_sample = f"If a call is of one sample, as of one graph, {ONE_AT_A_TIME}"
            last = LISTED if self._runs.arguments.is_listed else of_one_sample
            return (
                f"the forward mixes samples, since the outputs for one change by {difference:.2g} without the others."
                " Keep sums, statistics, shuffles and attention within each sample (for batch normalisation see"
                f" rgd_ext.convert_batch_norm). {last}"
            )
        return (
            "the capture credits samples with what belongs to others, since the forward reorders them, or a dimension"
            f" is as large as the batch by chance. {_REMEDIES}"
        )

    def _error(self, message: str, error: float) -> Exception:
        """Unless parameters or outputs change from call to call, or rounding is as large as the error."""
        if self._runs.moves_parameters():
            return Unprovable("its forward changes parameters, which may be why its gradients differ")
        lowest = LowestPrecision()
        with uncompiled(), lowest:
            self._runs.forward()
        first, second = self._runs.forward(), self._runs.forward()
        if len(first) != len(second) or any(
            norm([sketch(a, a) - sketch(b, b)]) > self._tolerance * norm([sketch(a, a)])
            for a, b in zip(first, second, strict=True)
            if a.is_floating_point()
        ):
            return Unprovable("its outputs change from call to call, with the same random numbers")
        del first
        size = 2 * torch.finfo(lowest.dtype).eps
        tolerance = max(self._tolerance, TOLERANCE.get(lowest.dtype, 0.0))
        if error <= max(tolerance, 3 * self._change_by_noise(dict(enumerate(second)), size)):
            return Unprovable("rounding errors in its gradients are as large as what differs")
        return WrongGradients(f"{message}. To train with it as it is, pass verify=False")

    def _change_by_noise(self, outputs: dict[int, Tensor], size: float) -> float:
        """The relative change of gradients if the arguments change by `size`; none where they must not change."""
        cotangents = {n: cotangent(x, n) for n, x in outputs.items() if x.requires_grad and x.is_floating_point()}
        ordinary = self._runs.gradients.of(outputs, cotangents)
        try:
            others = dict(enumerate(self._runs.forward(partial(self._runs.arguments.noisy, size))))
        except Unprovable:
            return 0.0
        return largest_difference(self._runs.gradients.of(others, cotangents), ordinary, self._tolerance).error
