"""What a proof of a capture comes to: a report, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .precision import is_autocast

# The largest relative error that is rounding, by the lowest precision that takes part.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}


class Unprovable(Exception):  # noqa: N818
    """The proof cannot be carried out; the message says why."""


class NotRepeatable(Unprovable):
    """The forward raises when it is called once more.

    Attributes:
        output: the output of the captured forward, in a list, if the user's own call would have given the same.
    """

    def __init__(self, message: str, output: list[object] | None = None) -> None:
        super().__init__(message)
        self.output = output


class ForwardFailed(Unprovable):
    """The captured forward raises, which is the cause."""


class BackwardFailed(Unprovable):
    """The captured backward raises, which is the cause."""


class NotFinite(Unprovable):
    """There are infinite or undefined numbers, which may be others in the next call."""


class NothingToProve(Unprovable):
    """No output depends on parameters, or there are no samples."""


class WrongGradients(ValueError):  # noqa: N818
    """The capture gives wrong gradients."""


@dataclass(frozen=True)
class Verification:
    """What was proven of a captured model for one batch. Printed, it is one line.

    Attributes:
        batch_size: B, or None where no tensor came in.
        parameters: how many parameters were compared.
        samples: the numbers of the samples that were compared with autograd's gradients of them alone.
        largest_error: the largest error of all comparisons, relative to the norm of the parameter's gradient.
        where: the parameter with that error.
        tolerance: the largest error that counts as rounding.
        seconds: how long the proof took.
        note: what could not be proven and why, or empty.
        outputs: sketches of the outputs, by their places among the tensors that the module gives, if there are hooks
            inside that did not run.
        is_open: whether another call of the kind may show more: gradients were next to nothing, as behind weights that
            start with zero, or random numbers took one side of a branch.
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
    is_open: bool = field(default=False, repr=False)

    def __str__(self) -> str:
        alone = f", samples {' and '.join(map(str, self.samples))} of {self.batch_size} alone" if self.samples else ""
        text = (
            f"verified: {self.parameters} parameters{alone}; largest relative error {self.largest_error:.1e}"
            f" ('{self.where}', tolerance {self.tolerance:.0e}); {self.seconds:.3f} s"
        )
        return f"{text}; in part only: {self.note}" if self.note else text


def tolerance_of(x: Tensor, autocast: bool) -> float:
    """The largest relative error of `x` that is rounding, where autocast may be at work."""
    if autocast and is_autocast(x.device.type):
        return TOLERANCE[torch.get_autocast_dtype(x.device.type)]
    # On CUDA, products of float32 may be computed in TF32, which has the precision of float16.
    is_tf32 = x.is_cuda and x.dtype == torch.float32
    return TOLERANCE[torch.float16 if is_tf32 else x.dtype]
