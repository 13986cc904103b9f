"""The proof that the rows of a Jacobian are the gradients of the residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..capture.findings import TOLERANCE
from ..capture.precision import full_precision
from .jacobian import Jacobian
from .residuals import columns_of, joined

_NOT_REPEATABLE = (
    "the closure returns other residuals when it is called again with the same parameters: {:.6g} in the place of"
    " {:.6g} for residual {}. Draw batches and random numbers outside of it, before step(closure); or with"
    " adaptive=False pass verify=False"
)
_MIXED = (
    "residuals depend on other samples than their own: the gradients of the samples with respect to '{}' differ from"
    " those of the residuals by a relative error of {:.0e}. Let residual i be a function of sample i alone, without"
    " means over the batch or values that all samples share, and in the order of the samples"
)


def prove(
    jacobian: Jacobian, batches: Sequence[Tensor], again: Sequence[Tensor], name_of: Callable[[nn.Parameter], str]
) -> None:
    """Compare a sum of the rows with random weights with autograd's gradient of that sum of the residuals.

    Unless all rows are the gradients of their residuals, the two differ for nearly all weights.

    Args:
        jacobian: the Jacobian.
        batches: the residuals that it belongs to.
        again: the same from another evaluation of the closure, in ordinary autograd.
        name_of: gives the name of a parameter.

    Raises:
        ValueError: if the evaluations differ, or the gradients.
    """
    before, after = joined(batches), joined(again)
    tolerance = TOLERANCE[max((p.dtype for p in jacobian.parameters), key=TOLERANCE.__getitem__)]
    if len(before) != len(after):
        raise ValueError(
            f"the closure returns {len(after)} residuals in the place of {len(before)} when it is called again: draw"
            " batches outside of it, before step(closure)"
        )
    errors = (before - after).abs() - tolerance * (before.abs() + before.square().mean().sqrt())
    if (errors > 0).any():
        place = int(errors.argmax())
        raise ValueError(_NOT_REPEATABLE.format(after[place].item(), before[place].item(), place))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(before), generator=generator, dtype=torch.float64).to(before.device)
    loss = torch.cat([column.double() for column in columns_of(again)]) @ weights
    gradients = torch.autograd.grad(loss, jacobian.parameters, allow_unused=True)
    with torch.no_grad(), full_precision(before.device):
        found, norms = jacobian.transposed_times(weights), jacobian.row_norms()
        for parameter, row, norm, gradient in zip(jacobian.parameters, found, norms, gradients, strict=True):
            difference = row if gradient is None else row - gradient
            scale = (weights * norm).norm() + (0 if gradient is None else gradient.double().norm())
            error = difference.double().norm()
            # What is not finite is told by the equations.
            if error > tolerance * scale:
                raise ValueError(_MIXED.format(name_of(parameter), (error / scale).item()))
