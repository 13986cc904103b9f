"""Directions in float64, from one backward of plain autograd for each sample. Those of RGD are compared with them.

A ReLU has a kink at zero. Where rounding moves an input across it, float32 and float64 differentiate different
functions, and the gradients of a deep network differ by 1e-3. So the oracle takes the side of each input from the run
that it is compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .models import loss

BATCH_NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class Sides(TorchFunctionMode):
    """Notes which inputs of ReLUs are positive, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.positive: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.relu:
            self.positive.append(result > 0)
        return result


class TakeSides(TorchFunctionMode):
    """Replaces every ReLU by a product with 1 where the noted input was positive, and with 0 elsewhere."""

    def __init__(self, positive: Iterator[Tensor]) -> None:
        super().__init__()
        self.positive = positive

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.relu:
            return args[0] * next(self.positive)
        return function(*args, **(kwargs or {}))


def per_sample_grads(model: nn.Module, x: Tensor, y: Tensor, sides: Sides) -> list[Tensor]:
    """The gradients g_i in float64, as (B, *shape) tensors; with batch norm, B times the contributions."""
    model, x = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x
    if any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        return contributions(model, x, y, sides)
    parameters = list(model.parameters())
    grads = [p.new_empty(len(x), *p.shape) for p in parameters]
    for i in range(len(x)):
        with TakeSides(side[i : i + 1] for side in sides.positive):
            row = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), parameters)
        for grad, part in zip(grads, row, strict=True):
            grad[i] = part
    return grads


def contributions(model: nn.Module, x: Tensor, y: Tensor, sides: Sides) -> list[Tensor]:
    """B times the derivative with respect to the copy of the weights that sample i uses.

    Each sample uses its own copy of all weights. The copies have equal values, so the derivatives add up to the
    gradient. In every module with parameters, the first dimension of the input must be the batch. The `forward` methods
    of `model` are replaced.
    """
    own = []
    for module in list(model.modules()):
        named = dict(module.named_parameters(recurse=False))
        if named:
            copies = {name: p.detach().expand(len(x), *p.shape).clone().requires_grad_() for name, p in named.items()}
            own += copies.values()
            forward = normalised if isinstance(module, BATCH_NORMS) else sample_by_sample
            module.forward = partial(forward, copy.copy(module), copies)
    with TakeSides(iter(sides.positive)):
        output = model(x)
    return [grad * len(x) for grad in torch.autograd.grad(loss(output, y), own)]


def sample_by_sample(module: nn.Module, own: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output of `module`, each sample by its own weights."""
    return torch.func.vmap(lambda own, x: torch.func.functional_call(module, own, (x[None],))[0])(own, x)


def normalised(module: nn.Module, own: dict[str, Tensor], x: Tensor) -> Tensor:
    """Batch normalisation by the statistics of the batch, each sample by its own scale and shift."""
    shape = *x.shape[:2], *(1,) * (x.ndim - 2)
    unscaled = F.batch_norm(x, None, None, training=True, eps=module.eps)
    return unscaled * own["weight"].view(shape) + own["bias"].view(shape)


def direction(grads: list[Tensor], policy: str, fraction: float) -> list[Tensor]:
    """(I - eps D) g, eq. (10), with eps = fraction / lambda_max, or fraction |g|^2 / (g^T D g)."""
    means = [g.mean(0) for g in grads]
    centred = torch.cat([(g - m).flatten(1) for g, m in zip(grads, means, strict=True)], 1)
    mean = torch.cat([m.flatten() for m in means])
    alignments, size = centred @ mean, len(centred)
    largest = torch.linalg.eigvalsh(centred @ centred.T)[-1] / size
    quotient = {"Spectral": largest, "Rayleigh": alignments.square().mean() / mean.square().sum()}[policy]
    step = mean - fraction / quotient * (alignments @ centred) / size
    return [part.view_as(m) for part, m in zip(step.split([m.numel() for m in means]), means, strict=True)]


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """|got - want| / |want|."""
    squared = torch.stack([(g.double() - w).square().sum() for g, w in zip(got, want, strict=True)]).sum()
    return float((squared / torch.stack([w.double().square().sum() for w in want]).sum()).sqrt())
