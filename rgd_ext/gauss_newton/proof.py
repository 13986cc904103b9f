"""The proof that the rows of a Jacobian are the gradients of the residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..capture.residuals import Unproven
from .equations import Equations, Vector
from .residuals import columns_of, joined

# The share of the whole gradient, at least, that the error in a parameter is compared with.
_SHARE = 1e-2
_OTHER_NUMBER = (
    "the closure returned {} residuals, and {} when it was called again with the same parameters: draw batches outside"
    " of it, before step(closure)"
)
_NOT_REPEATABLE = (
    "the closure returns other residuals when it is called again with the same parameters: {:.6g} in the place of"
    " {:.6g} for residual {}. Draw batches and random numbers outside of it, before step(closure), and let the model"
    " keep samples apart; if the closure has to draw batches, pass adaptive=False and verify=False"
)
_MIXED = (
    "residuals depend on other samples than their own, or on '{}' in a way that is not captured: the gradients of the"
    " samples with respect to it differ from those of the residuals by a relative error of {:.0e}. Let residual i be a"
    " function of sample i alone, without means over the batch or values that all samples share, in the order of the"
    " samples. If it is, compute the residuals in the forward of a module, and call that module alone in the closure"
)
_BROADCAST = (
    "the closure returned residuals of shape {}, whose columns have equal gradients, as of model(x) - y with model(x)"
    " of shape (B, 1) and y of shape (B,): subtract tensors of equal shapes, such as model(x)[:, 0] - y"
)


def check_number(residuals: Tensor, number: int) -> None:
    """Raise ValueError unless another evaluation of the closure has returned as many residuals as the first."""
    if len(residuals) != number:
        raise ValueError(_OTHER_NUMBER.format(number, len(residuals)))


def prove(
    equations: Equations,
    batches: Sequence[Tensor],
    again: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    tolerance: float,
    name_of: Callable[[nn.Parameter], str],
) -> None:
    """Compare sums of the rows of J with random weights with autograd's gradients of these sums of the residuals.

    There is one sum for each column of residuals, in which all rows have the same share. Unless all rows are the
    gradients of their residuals, the two differ for nearly all weights.

    Args:
        equations: those with the Jacobian.
        batches: the residuals.
        again: the same from another evaluation of the closure, in ordinary autograd.
        parameters: all that are fitted; those without rows have zeros.
        tolerance: the largest relative error that is rounding.
        name_of: gives the name of a parameter.

    Raises:
        ValueError: if the evaluations differ.
        Unproven: if the gradients do.
    """
    _check_repeatable(joined(batches), joined(again), tolerance)
    jacobian = equations.jacobian
    norms = equations.row_norms()
    places, start = {p: place for place, p in enumerate(jacobian.parameters)}, 0
    for batch in again:
        sums: list[Vector] = []
        with torch.enable_grad():
            columns = columns_of([batch])
        for column in columns:
            weights = _weights(norms[start : start + len(column)])
            with torch.enable_grad():
                total = (column.double() * weights).sum()
            gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
            of_all = torch.zeros_like(norms)
            of_all[start : start + len(column)] = weights
            rows = jacobian.transposed_times(of_all)
            found = [rows[places[p]] if p in places else torch.zeros_like(p) for p in parameters]
            _compare(
                found,
                [_dense(g, p) for g, p in zip(gradients, parameters, strict=True)],
                tolerance,
                parameters,
                name_of,
            )
            sums.append(found)
            start += len(column)
        if (
            batch.ndim == 2
            and 1 < len(batch) == batch.shape[1]
            and _are_equal(sums, norms[start - batch.numel() : start])
        ):
            raise ValueError(_BROADCAST.format(tuple(batch.shape)))


def _check_repeatable(before: Tensor, after: Tensor, tolerance: float) -> None:
    check_number(after, len(before))
    errors = (before - after).abs() - tolerance * (before.abs() + before.square().mean().sqrt())
    if (errors > 0).any():
        place = int(errors.argmax())
        raise ValueError(_NOT_REPEATABLE.format(after[place].item(), before[place].item(), place))


def _weights(norms: Tensor) -> Tensor:
    """Random weights over the norms of the rows; rows of zeros have the weight of a row of the mean norm."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(norms), generator=generator, dtype=torch.float64).to(norms.device)
    mean = norms.mean()
    norms = torch.where(norms > 0, norms, torch.where(mean > 0, mean, 1.0))
    return weights / norms


def _dense(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient


def _compare(
    found: Vector,
    expected: Vector,
    tolerance: float,
    parameters: Sequence[nn.Parameter],
    name_of: Callable[[nn.Parameter], str],
) -> None:
    norms = torch.stack([g.double().norm() for g in expected])
    for parameter, row, gradient, norm in zip(parameters, found, expected, norms, strict=True):
        error = (row - gradient).double().norm()
        scale = torch.maximum(norm, _SHARE * norms.norm())
        # What is not finite is told by the equations.
        if error > tolerance * scale:
            raise Unproven(_MIXED.format(name_of(parameter), (error / scale).item()))


def _are_equal(sums: Sequence[Vector], norms: Tensor) -> bool:
    """Whether all columns have equal sums of rows, which are not zero."""
    first, *others = sums
    size = torch.stack([s.double().norm() for s in first]).norm()
    differences = [(s - o).double().norm() for other in others for s, o in zip(first, other, strict=True)]
    return bool(norms.amax() > 0 and torch.stack(differences).amax() <= 1e-6 * size)
