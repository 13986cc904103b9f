"""Products of the samples with a value that they all share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contributions.outer import Outer
from ...layers.spec import LINEAR
from ..native import native_spec
from ..nodes import watch
from ..rule_output import BoundRule, RuleOutput
from .product_kinds import ProductKind
from .shared_value import Number, SharedValue


class Product:
    """A call of a function that computes a product of samples with a value that they share.

    Args:
        kind: the kind of the product, for the operands as the function got them.
        x: the samples.
        value: the value.
        bias: what the function adds to the product if that is a shared value too, else None.
        run: (value, bias or None) -> what the function returns for these.

    Attributes:
        is_layer: whether a layer rule gives the contributions to a parameter itself.
        separate_bias: the bias, reshaped to be added to `output`, which is without it; None if `output` has it.
    """

    def __init__(
        self,
        kind: ProductKind,
        x: Tensor,
        value: SharedValue,
        bias: SharedValue | None,
        run: Callable[[Tensor, Tensor | None], Tensor],
    ) -> None:
        self.kind, self.x, self.value, self.bias, self.run = kind, x, value, bias, run
        self.is_layer = self._is_of_a_parameter() and kind.is_layer(value.tensor) and self._has_whole_rows()
        # A bias with one element may be broadcast, which layers do not do.
        is_vector = bias is not None and bias.parameter is not None and bias.tensor.ndim == 1 and len(bias.tensor) > 1
        self._has_bias_of_layer = is_vector and self.is_layer and kind.adds_bias(value.tensor)
        self.separate_bias = None if bias is None or self._has_bias_of_layer else self._addable(bias)

    def _is_of_a_parameter(self) -> bool:
        """Whether the value holds elements of a parameter, or multiples of them."""
        root, is_scaled = self.value.root, self.value.scale is not None
        if root is None or not root.is_contiguous() or (is_scaled and not self.x.is_floating_point()):
            return False
        return root.origin.parameter is not None

    def _has_whole_rows(self) -> bool:
        """Whether the value is the parameter as it is, or the matrix of all of its elements, or some rows of that."""
        length = self.kind.row_length(self.value.tensor)
        if length is None:
            return self.value.tensor.shape == self.value.root.shape
        margins = self.value.margins
        return not any(margins) or all(margin % length == 0 for margin in margins)

    def _addable(self, bias: SharedValue) -> SharedValue:
        """The bias with the dimensions that it has beside the product."""
        dims = self.kind.dims_behind_bias()
        if not dims:
            return bias
        return SharedValue.computed([bias], Tensor.reshape, (), {}, bias.tensor.reshape(-1, *[1] * dims))

    def output(self) -> Tensor:
        """What the function returns, without `separate_bias` and without gradients to the values."""
        return self.run(self.value.tensor.detach(), self.bias.tensor.detach() if self._has_bias_of_layer else None)

    def watched(self, output: Tensor, x: Tensor, kind: ProductKind) -> Tensor:
        """`output`, tied to the values by an autograd node.

        Args:
            output, x: those of all samples, which are along dimension 0.
            kind: the kind of the product of these.
        """
        value = self.value
        if not value.tensor.requires_grad or not torch.is_grad_enabled():
            return output
        if not self.is_layer:
            return _WatchedProduct.apply((kind, value.tensor), output, x, value.copies)
        origin = value.root.origin
        parameters = {"weight": origin.parameter}
        if self._has_bias_of_layer:
            parameters["bias"] = self.bias.parameter
        rule = partial(_contributions, kind, value.tensor, value.scale, value.root.shape)
        if any(value.margins):
            rule = partial(_padded_contributions, rule, value.margins)
        spec, operands = self._as_linear_layer(kind)
        return watch(origin.make_call(parameters, rule=rule, spec=spec, operands=operands), output, (x,))

    def _as_linear_layer(self, kind: ProductKind) -> tuple[object, Callable | None]:
        """The spec and the operands of the call, where the product is that of a linear layer."""
        value = self.value
        if value.tensor.shape != value.root.shape:
            return None, None
        if kind.is_linear(value.tensor):
            return (native_spec(LINEAR), None) if value.scale is None else (None, partial(_scaled_rows, value.scale))
        is_transposed = kind.is_transposed(value.tensor) and not self._has_bias_of_layer
        return None, partial(_swapped_rows, value.scale) if is_transposed else None


def _scaled(scale: Number | None, x: Tensor) -> Tensor:
    return x if scale is None else x * scale


def _scaled_rows(scale: Number, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _scaled(scale, x), grad


def _swapped_rows(scale: Number | None, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """x^T grad is the gradient of the weight of a linear layer whose inputs and output gradients are exchanged."""
    return grad, _scaled(scale, x)


def _contributions(
    kind: ProductKind, value: Tensor, scale: Number | None, shape: torch.Size, inputs: tuple[Tensor, ...], grad: Tensor
) -> RuleOutput:
    """The contributions to a parameter of this shape, whose elements times `scale` the value has."""
    return kind.layer(value, _scaled(scale, inputs[0]), grad, shape)


def _padded_contributions(
    rule: BoundRule, margins: tuple[int, int], inputs: tuple[Tensor, ...], grad: Tensor
) -> RuleOutput:
    """The contributions of `rule` to some rows of a parameter, with zeros for the rows before and behind them."""
    found = rule(inputs, grad)
    rows = found["weight"]
    length = rows.inputs.shape[2]
    padded = F.pad(rows.output_grads, [margin // length for margin in margins])
    return {**found, "weight": Outer(rows.inputs, padded, rows.shape)}


class _WatchedProduct(torch.autograd.Function):
    """The identity on a product, tied to the copies of the value in it."""

    @staticmethod
    def forward(ctx, product: tuple[ProductKind, Tensor], output: Tensor, x: Tensor, copies: Tensor) -> Tensor:
        ctx.kind, ctx.value = product  # a tuple, so that autograd does not take the value for an input
        ctx.save_for_backward(x)
        return output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        dtype = ctx.value.dtype
        x = x.to(dtype) if x.is_floating_point() else x
        return None, grad, None, ctx.kind.dense(ctx.value, x, grad.to(dtype))
