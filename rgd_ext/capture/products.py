"""Products of the samples with a value that they all share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .factors import Outer
from .forms import Contraction, Convolution, Form
from .nodes import BoundRule, Contributions, watch
from .values import Number, Value


class Product:
    """A function in which samples meet a value.

    Args:
        form: of the product, for its operands as the function got them.
        x: the samples.
        value: what they meet.
        bias: what the function adds to the product, if it is a value, else None.
        run: (value, bias or None) -> what the function gives for these.

    Attributes:
        is_layer: whether a layer rule gives the contributions to a parameter itself.
        rest: the bias, in dimensions of the output, if `output` is without it.
    """

    def __init__(
        self, form: Form, x: Tensor, value: Value, bias: Value | None, run: Callable[[Tensor, Tensor | None], Tensor]
    ) -> None:
        self.form, self.x, self.value, self.bias, self.run = form, x, value, bias, run
        self.is_layer = self._is_of_a_parameter() and form.is_layer(value.tensor) and self._has_whole_rows()
        # One number may be broadcast.
        is_vector = bias is not None and bias.parameter is not None and bias.tensor.ndim == 1 and len(bias.tensor) > 1
        self._has_layers_bias = is_vector and self.is_layer and form.adds_bias(value.tensor)
        self.rest = None if bias is None or self._has_layers_bias else self._in_dimensions_of_output(bias)

    def _is_of_a_parameter(self) -> bool:
        root, is_scaled = self.value.root, self.value.scale is not None
        if root is None or not root.is_contiguous() or (is_scaled and not self.x.is_floating_point()):
            return False
        return root.stands_for.parameter is not None

    def _has_whole_rows(self) -> bool:
        """Whether the value is the parameter as it is, or the matrix of all of its elements, or some rows of that."""
        if not isinstance(self.form, Contraction):
            return self.value.tensor.shape == self.value.root.shape
        if not any(self.value.margins):
            return True
        length = self.form.row_length(self.value.tensor)
        return all(margin % length == 0 for margin in self.value.margins)

    def _in_dimensions_of_output(self, bias: Value) -> Value:
        if not isinstance(self.form, Convolution):
            return bias
        return Value.computed([bias], Tensor.reshape, (), {}, bias.tensor.reshape(-1, *[1] * self.form.space))

    def output(self) -> Tensor:
        """What the function gives, without `rest`, constant in the values."""
        return self.run(self.value.tensor.detach(), self.bias.tensor.detach() if self._has_layers_bias else None)

    def watched(self, output: Tensor, x: Tensor, form: Form) -> Tensor:
        """`output`, tied to the values.

        Args:
            output, x: of all samples, which are in front.
            form: of the product of these.
        """
        value = self.value
        if not value.tensor.requires_grad or not torch.is_grad_enabled():
            return output
        if not self.is_layer:
            return _WatchedProduct.apply((form, value.tensor), output, x, value.copies)
        leaf = value.root.stands_for
        parameters = {"weight": leaf.parameter}
        if self._has_layers_bias:
            parameters["bias"] = self.bias.parameter
        rule = partial(_layer, form, value.tensor, value.scale, value.root.shape)
        if any(value.margins):
            rule = partial(_of_rows, rule, value.margins)
        is_matrix = isinstance(form, Contraction) and value.tensor.shape == value.root.shape
        is_linear = is_matrix and form.is_linear(value.tensor)
        record = leaf.make_record(parameters, rule, "linear" if is_linear and value.scale is None else None)
        if is_linear and value.scale is not None:
            record.as_linear = partial(_scaled_rows, value.scale)
        elif is_matrix and form.is_transposed(value.tensor) and not self._has_layers_bias:
            record.as_linear = partial(_swapped_rows, value.scale)
        return watch(record, output, (x,))


def _scaled(scale: Number | None, x: Tensor) -> Tensor:
    return x if scale is None else x * scale


def _scaled_rows(scale: Number, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _scaled(scale, x), grad


def _swapped_rows(scale: Number | None, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """x^T grad is the gradient of the weight of a layer with these in each other's places."""
    return grad, _scaled(scale, x)


def _layer(
    form: Form, value: Tensor, scale: Number | None, shape: torch.Size, inputs: tuple[Tensor, ...], grad: Tensor
) -> Contributions:
    return form.layer(value, _scaled(scale, inputs[0]), grad, shape)


def _of_rows(rule: BoundRule, margins: tuple[int, int], inputs: tuple[Tensor, ...], grad: Tensor) -> Contributions:
    """What `rule` gives, of a weight that is some rows of the parameter: the others get nothing."""
    found = rule(inputs, grad)
    rows = found["weight"]
    length = rows.inputs.shape[2]
    padded = F.pad(rows.output_grads, [margin // length for margin in margins])
    return found | {"weight": Outer(rows.inputs, padded, rows.shape)}


class _WatchedProduct(torch.autograd.Function):
    """The identity on a product, tied to the copies of the value in it."""

    @staticmethod
    def forward(ctx, product: tuple[Form, Tensor], output: Tensor, x: Tensor, copies: Tensor) -> Tensor:
        ctx.form, ctx.value = product  # in a tuple, or autograd would take the value for an input
        ctx.save_for_backward(x)
        return output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        dtype = ctx.value.dtype
        x = x.to(dtype) if x.is_floating_point() else x
        return None, grad, None, ctx.form.dense(ctx.value, x, grad.to(dtype))
