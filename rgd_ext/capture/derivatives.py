"""Derivatives of a forward with respect to its inputs, in a loss of which the contributions of the samples are wanted.

They use the weights of linear layers again, forwards and transposed. Each use is a node in ordinary autograd's graph,
with the samples along dimension 0, whether the user differentiates by `torch.autograd.grad(..., create_graph=True)` or
by torch.func, and tells what its samples contribute when the backward of the loss comes by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .native import LayerCall, wanted_by_engine

_REMEDY = (
    "Compute the residuals in the forward of a module that has all of these parameters, pass that module to"
    " GaussNewton, and call it alone in the closure: it is captured as one unit then"
)
THROUGH_LAYER = (
    "module '{}' was differentiated with respect to its input, which is followed through nn.Linear and functions"
    f" without parameters alone. {_REMEDY}"
)
OUTSIDE = (
    "parameter '{}' of shape {} got gradient outside the forward of its module: in a torch.func transform of a layer"
    f" other than nn.Linear, or because the closure or another module uses it. {_REMEDY}"
)
# (parameter, inputs or None for a bias, output gradients): what a backward finds at a use of a parameter.
Take = Callable[[nn.Parameter, Tensor | None, Tensor], None]


class InnerDerivative(RuntimeError):  # noqa: N818
    """The forward was differentiated with respect to its inputs in a way that its recorders do not follow."""


class Derivatives:
    """Whether recorders follow derivatives, which takes more time than a forward that is not differentiated.

    Attributes:
        are_followed: whether they do.
        samples: a call with the samples of the backward under way, or None.
    """

    def __init__(self) -> None:
        self.are_followed = False
        self.samples: LayerCall | None = None

    @contextmanager
    def of(self, samples: LayerCall) -> Iterator[None]:
        """Backwards inside are for the samples of this call."""
        self.samples = samples
        try:
            yield
        finally:
            self.samples = None  # the garbage collector does not see into a compiled call, which leads back to here

    def follow(self) -> None:
        """From now on recorders follow derivatives."""
        self.are_followed = True


def linear(x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, take: Take) -> Tensor:
    """x W^T + b, which may be differentiated with respect to x any number of times, by any means of torch.

    Args:
        x: (..., n).
        weight, bias: (m, n) and (m,), or None; those that are frozen need no `take`.
        take: called in the backward for each use of a parameter.
    """
    x = _Product.apply(x, weight, take, False) if weight.requires_grad else F.linear(x, weight)
    if bias is None:
        return x
    # The sum is torch's own: inside of the `jvp` of a function, forward-mode derivatives of second order are lost in
    # all operators but such functions.
    return x + (_Bias.apply(x.detach(), bias, take) if bias.requires_grad else bias)


def _is_wanted(edge: tuple) -> bool:
    """Whether the backward that runs is that of the loss, and wants the gradient of a parameter."""
    # The backward of an inner derivative builds a graph, which that of the loss goes through: its uses count then.
    if torch.is_grad_enabled():
        return False
    wanted = wanted_by_engine([edge])
    return wanted is not None and wanted[0]


class _Product(torch.autograd.Function):
    """x W^T, or x W for `is_transposed`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, take: Take, is_transposed: bool) -> Tensor:
        return x @ weight if is_transposed else F.linear(x, weight)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, ctx.take, ctx.is_transposed = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        if _is_wanted(ctx.next_functions[1]):
            inputs, output_grads = (grad, x) if ctx.is_transposed else (x, grad)
            ctx.take(weight, inputs, output_grads)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return _Product.apply(grad, weight, ctx.take, not ctx.is_transposed), None, None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_) -> Tensor:
        (weight,) = ctx.saved_tensors
        return _Product.apply(tangent, weight, ctx.take, ctx.is_transposed)

    @staticmethod
    def vmap(info, in_dims: tuple, x: Tensor, weight: Tensor, take: Take, is_transposed: bool):
        return _Product.apply(x.movedim(in_dims[0], 0), weight, take, is_transposed), 0


class _Bias(torch.autograd.Function):
    """b for each row of a tensor that is detached: only b has derivatives."""

    @staticmethod
    def forward(rows: Tensor, bias: Tensor, take: Take) -> Tensor:
        return bias.expand_as(rows).clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, bias, ctx.take = inputs
        ctx.save_for_backward(bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (bias,) = ctx.saved_tensors
        if _is_wanted(ctx.next_functions[1]):
            ctx.take(bias, None, grad)
        return None, None, None

    @staticmethod
    def vmap(info, in_dims: tuple, rows: Tensor, bias: Tensor, take: Take):
        return _Bias.apply(rows.movedim(in_dims[0], 0), bias, take), 0
