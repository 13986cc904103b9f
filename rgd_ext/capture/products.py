"""Products of the samples with a value that they all share: a layer rule gives their contributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from string import ascii_letters
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.modules.utils import _ntuple

from .factors import Bias, Outer
from .nodes import Contributions, watch
from .rules import convolution, embedding, transposed_convolution
from .values import Number, Value, memory_order

# The letter of the samples' dimension where a function sees one sample.
_SAMPLES = ascii_letters[-1]


class Form(Protocol):
    """What kind of product of x and v it is."""

    def of_all(self, x: Tensor) -> tuple[Form, bool] | None:
        """The form of the same product of all samples (B, *x.shape), given that of a sample, `x`.

        And whether dimension 0 of the sample, which has size 1, is left out. None if there is no such form.
        """
        ...

    def has_samples_in_front(self) -> bool:
        """Whether dimension 0 of x is one of samples, and dimension 0 of the product."""
        ...

    def is_layer(self, value: Tensor) -> bool:
        """Whether `layer` serves a value with these strides."""
        ...

    def adds_bias(self, value: Tensor) -> bool:
        """Whether a bias, a vector, has the dimension of the product that v has and x has not."""
        ...

    def layer(self, value: Tensor, x: Tensor, grad: Tensor, shape: torch.Size) -> Contributions:
        """The contributions to "weight", of that shape, which has the elements of v as they lie in memory.

        And to "bias", which is added to the product.
        """
        ...

    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        """The contributions to v, (B, *shape)."""
        ...


@dataclass(frozen=True)
class Contraction:
    """The sum of x v over letters that `out` has not, as in `torch.einsum`; no operand has a letter twice."""

    x: str
    v: str
    out: str

    def of_all(self, x: Tensor) -> tuple[Contraction, bool]:
        if self.x[:1] == self.out[:1] != "" and self.x[0] not in self.v and x.shape[0] == 1:
            return self, True
        return Contraction(_SAMPLES + self.x, self.v, _SAMPLES + self.out), False

    def has_samples_in_front(self) -> bool:
        return self.x[:1] == self.out[:1] != "" and self.x[0] not in self.v

    def is_linear(self, value: Tensor) -> bool:
        """Whether it is x v^T with the matrix v, (m, n)."""
        is_last = self.x[:-1] == self.out[:-1] and self.v == self.out[-1:] + self.x[-1:]
        return is_last and value.is_contiguous()

    def is_layer(self, value: Tensor) -> bool:
        summed, free = self._sides(value)
        return self._order(value) in (free + summed, summed + free)

    def adds_bias(self, value: Tensor) -> bool:
        return self._sides(value)[1] == self.out[-1:]

    def _order(self, value: Tensor) -> str:
        """The letters of v as it lies in memory."""
        return "".join(self.v[dim] for dim in memory_order(value))

    def _sides(self, value: Tensor) -> tuple[str, str]:
        """Letters of v that are summed over, and those that x has not."""
        order = self._order(value)
        return "".join(c for c in order if c not in self.out), "".join(c for c in order if c not in self.x)

    def layer(self, value: Tensor, x: Tensor, grad: Tensor, shape: torch.Size) -> Contributions:
        summed, free = self._sides(value)
        places = "".join(c for c in self.out[1:] if c in self.x)
        inputs, grads = self._rows(x, self.x, places, summed), self._rows(grad, self.out, places, free)
        if self._order(value) == free + summed:
            factor = Outer(inputs, grads, shape)
            return {"weight": factor, "bias": Bias(factor)}
        return {"weight": Outer(grads, inputs, shape), "bias": grads.sum(1)}

    def _rows(self, tensor: Tensor, letters: str, places: str, columns: str) -> Tensor:
        """(B, places, columns)."""
        order = [letters.index(c) for c in letters[0] + places + columns]
        return tensor.permute(order).reshape(len(tensor), -1, _sizes(tensor, letters, columns))

    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return torch.einsum(f"{self.out},{self.x}->{self.out[0]}{self.v}", grad, x)


def _sizes(tensor: Tensor, letters: str, some: str) -> int:
    return torch.Size([tensor.shape[letters.index(c)] for c in some]).numel()


@dataclass(frozen=True)
class Convolved:
    """A convolution of x with the weight v.

    Attributes:
        rule: of the layer.
        options: stride, padding, dilation and groups, under the names that layers have for them.
        space: number of its dimensions.
    """

    rule: Callable
    options: dict
    space: int

    def of_all(self, x: Tensor) -> tuple[Convolved, bool] | None:
        if x.ndim == self.space + 1:
            return self, False
        return (self, True) if x.shape[0] == 1 else None

    def has_samples_in_front(self) -> bool:
        return True

    def is_layer(self, value: Tensor) -> bool:
        return value.is_contiguous()

    def adds_bias(self, value: Tensor) -> bool:
        return True

    def layer(self, value: Tensor, x: Tensor, grad: Tensor, shape: torch.Size) -> Contributions:
        weight = SimpleNamespace(shape=shape, requires_grad=True)
        options = {"kernel_size": value.shape[2:], "padding_mode": "zeros"} | self.options
        return self.rule(SimpleNamespace(weight=weight, bias=value, **options), (x,), grad)

    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return self.layer(value, x, grad, value.shape)["weight"].dense()


@dataclass(frozen=True)
class Lookup:
    """Rows of the table v, by indices x.

    Attributes:
        padding: the row that gets no gradient, or None.
        is_sparse: whether the table's gradient is.
    """

    padding: int | None
    is_sparse: bool = False

    def of_all(self, x: Tensor) -> tuple[Lookup, bool]:
        return self, x.ndim > 0 and x.shape[0] == 1

    def has_samples_in_front(self) -> bool:
        return True

    def is_layer(self, value: Tensor) -> bool:
        return value.ndim == 2 and value.is_contiguous()

    def adds_bias(self, value: Tensor) -> bool:
        return False

    def layer(self, value: Tensor, x: Tensor, grad: Tensor, shape: torch.Size) -> Contributions:
        rows = len(value)
        padding = None if self.padding is None else self.padding % rows
        table = SimpleNamespace(shape=torch.Size((rows, shape.numel() // rows)))
        layer = SimpleNamespace(weight=table, padding_idx=padding, scale_grad_by_freq=False, sparse=self.is_sparse)
        return embedding(layer, (x.remainder(rows),), grad)

    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return self.layer(value, x, grad, value.shape)["weight"].dense().view(-1, *value.shape)


@dataclass(frozen=True)
class Elementwise:
    """x v, x + v or x - v, with v broadcast against x.

    Attributes:
        sign: of v in a sum; None in a product.
    """

    sign: float | None

    def of_all(self, x: Tensor) -> None:
        return None  # copies for each sample cost as little

    def has_samples_in_front(self) -> bool:
        return True

    def is_layer(self, value: Tensor) -> bool:
        return False

    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        products = grad * (x if self.sign is None else self.sign)
        sizes = [1] * (grad.ndim - value.ndim) + list(value.shape)
        broadcast = [dim for dim in range(1, grad.ndim) if sizes[dim] == 1]
        return (products.sum(broadcast) if broadcast else products).reshape(len(grad), *value.shape)


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
        self.is_layer = self._is_of_a_parameter() and form.is_layer(value.tensor)
        is_vector = bias is not None and bias.parameter is not None and bias.tensor.ndim == 1
        self._has_layers_bias = is_vector and self.is_layer and form.adds_bias(value.tensor)
        self.rest = None if bias is None or self._has_layers_bias else self._in_dimensions_of_output(bias)

    def _is_of_a_parameter(self) -> bool:
        root, is_scaled = self.value.root, self.value.scale is not None
        if root is None or not root.is_contiguous() or (is_scaled and not self.x.is_floating_point()):
            return False
        return root.stands_for.parameter is not None

    def _in_dimensions_of_output(self, bias: Value) -> Value:
        if not isinstance(self.form, Convolved):
            return bias
        return bias.computed(Tensor.reshape, (), {}, bias.tensor.reshape(-1, *[1] * self.form.space))

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
            return _Met.apply((form, value.tensor), output, x, value.copies)
        leaf = value.root.stands_for
        parameters = {"weight": leaf.parameter}
        if self._has_layers_bias:
            parameters["bias"] = self.bias.parameter
        is_linear = value.scale is None and isinstance(form, Contraction) and form.is_linear(value.tensor)
        rule = partial(_layer, form, value.tensor, value.scale, value.root.shape)
        return watch(leaf.use(parameters, rule, "linear" if is_linear else None), output, (x,))


def _layer(
    form: Form, value: Tensor, scale: Number | None, shape: torch.Size, inputs: tuple[Tensor, ...], grad: Tensor
) -> Contributions:
    return form.layer(value, inputs[0] if scale is None else inputs[0] * scale, grad, shape)


class _Met(torch.autograd.Function):
    """The identity on a product, tied to the copies of the value in it."""

    @staticmethod
    def forward(ctx, product: tuple[Form, Tensor], output: Tensor, x: Tensor, copies: Tensor) -> Tensor:
        ctx.form, ctx.value = product  # in a tuple: the value's graph is no part of this one
        ctx.save_for_backward(x)
        return output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        dtype = ctx.value.dtype
        x = x.to(dtype) if x.is_floating_point() else x
        return None, grad, None, ctx.form.dense(ctx.value, x, grad.to(dtype))


def product_of(
    function: Callable, args: tuple, kwargs: dict, value_of: Callable[[object], Value | None]
) -> Product | None:
    """The product that a function is, if samples meet a value in it; None for other functions.

    Args:
        function: with a name, as torch's functions have.
        args, kwargs: its arguments.
        value_of: argument -> the value that it stands for, or None.

    Raises:
        RuntimeError: if the function changes a value.
    """
    parse = _PARSERS.get(function.__name__)
    if parse is None:
        return None
    try:
        product = parse(function, value_of, *args, **kwargs)
    except TypeError:  # of other arguments than these
        return None
    is_real = product is not None and product.x.layout == torch.strided and not product.x.is_complex()
    return product if is_real and product.value.tensor.is_floating_point() else None


def _linear(function, value_of, input, weight, bias=None) -> Product | None:  # noqa: A002
    value = value_of(weight)
    if value is None or value_of(input) is not None:
        return None
    leading = ascii_letters[: input.ndim - 1]
    form = Contraction(leading + "y", "xy"[2 - value.tensor.ndim :], leading + "x" * (value.tensor.ndim - 1))
    return _with_bias(form, input, value, bias, value_of, partial(function, input))


def _with_bias(form, x, value, bias, value_of, run) -> Product:
    if bias is None or value_of(bias) is not None:
        return Product(form, x, value, value_of(bias), run)
    return Product(form, x, value, None, lambda v, _: run(v, bias))


def _matmul(function, value_of, left, right) -> Product | None:
    values = value_of(left), value_of(right)
    if (values[0] is None) == (values[1] is None):
        return None
    a, b, out = _letters_of_matmul(left.ndim, right.ndim)
    if values[0] is None:
        return Product(Contraction(a, b, out), left, values[1], None, lambda v, _: function(left, v))
    return Product(Contraction(b, a, out), right, values[0], None, lambda v, _: function(v, right))


def _letters_of_matmul(left: int, right: int) -> tuple[str, str, str]:
    """Of both factors, given their numbers of dimensions, and their product. Autograd sums over what is broadcast."""
    leading = ascii_letters[: max(left, right, 2) - 2]
    sides = [leading[len(leading) - max(number - 2, 0) :] for number in (left, right)]
    row, column = "x" if left > 1 else "", "z" if right > 1 else ""
    return sides[0] + row + "y", sides[1] + "y" + column, leading + row + column


def _addmm(function, value_of, input, mat1, mat2, *, beta=1, alpha=1) -> Product | None:  # noqa: A002
    product = _matmul(torch.matmul, value_of, mat1, mat2)
    if product is None or beta != 1 or alpha != 1:
        return None
    added = value_of(input)

    def run(value: Tensor, bias: Tensor | None) -> Tensor:
        output = product.run(value, None)
        addend = input if added is None else bias
        return output if addend is None else output + addend

    return Product(product.form, product.x, product.value, added, run)


def _einsum(function, value_of, equation, *operands) -> Product | None:
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    values = [value_of(x) for x in operands]
    if not isinstance(equation, str) or len(operands) != 2 or (values[0] is None) == (values[1] is None):
        return None
    place = 0 if values[1] is None else 1  # of the value
    letters = _letters_of_einsum(equation, [x.shape for x in operands])
    if letters is None:
        return None
    form = Contraction(letters[1 - place], letters[place], letters[2])

    def run(value: Tensor, _: None) -> Tensor:
        return function(equation, *(value if n == place else x for n, x in enumerate(operands)))

    return Product(form, operands[1 - place], values[place], None, run)


def _letters_of_einsum(equation: str, shapes: Sequence[torch.Size]) -> tuple[str, str, str] | None:
    """Of both operands and the result, without ellipses; None for what is no `Contraction`."""
    terms = equation.replace(" ", "").replace("->", ",").split(",")
    if "->" not in equation or len(terms) != 3:
        return None
    if any(len(shape) != len(term) for term, shape in zip(terms, shapes, strict=False) if "..." not in term):
        return None
    unused = [c for c in ascii_letters[:-1] if c not in equation]
    missing = [len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, shapes, strict=False)]
    dots = "".join(unused[: max(missing)])
    terms = [term.replace("...", dots[len(dots) - n :]) for term, n in zip(terms, [*missing, len(dots)], strict=True)]
    sizes = [dict(zip(term, shape, strict=True)) for term, shape in zip(terms, shapes, strict=False)]
    is_plain = all(len(set(term)) == len(term) for term in terms) and _SAMPLES not in equation
    agree = all(sizes[0].get(c, n) == n for c, n in sizes[1].items())
    is_summed_alone = any(sum(c in term for term in terms) == 1 for c in "".join(terms))
    return tuple(terms) if is_plain and agree and not is_summed_alone else None


def _convolution(function, value_of, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # noqa: A002
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return _convolved(convolution, options, function, value_of, input, weight, bias)


def _transposed_convolution(
    function,
    value_of,
    input,  # noqa: A002
    weight,
    bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
):
    options = {"stride": stride, "padding": padding, "output_padding": output_padding}
    options |= {"groups": groups, "dilation": dilation}
    return _convolved(transposed_convolution, options, function, value_of, input, weight, bias)


def _convolved(rule, options: dict, function, value_of, input, weight, bias) -> Product | None:  # noqa: A002
    value = value_of(weight)
    if value is None or value_of(input) is not None or isinstance(options["padding"], str):
        return None
    space = value.tensor.ndim - 2
    expand = _ntuple(space)
    geometry = {name: number if name == "groups" else expand(number) for name, number in options.items()}
    form = Convolved(rule, geometry, space)
    return _with_bias(form, input, value, bias, value_of, lambda v, b: function(input, v, b, **options))


def _embedding(
    function,
    value_of,
    input,  # noqa: A002
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
) -> Product | None:
    value = value_of(weight)
    if value is None or scale_grad_by_freq:
        return None
    if max_norm is not None:
        raise RuntimeError("max_norm changes a parameter in place")
    return Product(Lookup(padding_idx, sparse), input, value, None, lambda v, _: function(input, v))


def _getitem(function, value_of, table, index) -> Product | None:
    is_index = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if value_of(table) is None or not is_index or not table.ndim:
        return None
    return Product(Lookup(None), index, value_of(table), None, lambda v, _: function(v, index))


def _product(function, value_of, left, right) -> Product | None:
    return _elementwise(function, value_of, left, right, (None, None))


def _sum(function, value_of, left, right, *, alpha=1) -> Product | None:
    return _elementwise(function, value_of, left, right, (1, 1)) if alpha == 1 else None


def _difference(function, value_of, left, right, *, alpha=1) -> Product | None:
    return _elementwise(function, value_of, left, right, (1, -1)) if alpha == 1 else None


def _elementwise(function, value_of, left, right, signs: tuple[int | None, int | None]) -> Product | None:
    values = value_of(left), value_of(right)
    place = 0 if values[1] is None else 1  # of the value
    value, x = values[place], (right, left)[place]
    if values[1 - place] is not None or not isinstance(x, Tensor) or not _is_broadcast(value.tensor, x):
        return None

    def run(value: Tensor, _: None) -> Tensor:
        return function(left, value) if place else function(value, right)

    return Product(Elementwise(signs[place]), x, value, None, run)


def _is_broadcast(value: Tensor, x: Tensor) -> bool:
    """Along the first dimension of x."""
    return value.ndim < x.ndim or (value.ndim == x.ndim and value.shape[0] == 1)


_PARSERS: dict[str, Callable[..., Product | None]] = {
    "linear": _linear,
    **dict.fromkeys(["matmul", "__matmul__", "mm", "bmm", "mv"], _matmul),
    "addmm": _addmm,
    "einsum": _einsum,
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _transposed_convolution),
    "embedding": _embedding,
    "__getitem__": _getitem,
    **dict.fromkeys(["mul", "multiply", "__mul__", "__rmul__"], _product),
    **dict.fromkeys(["add", "__add__", "__radd__"], _sum),
    **dict.fromkeys(["sub", "__sub__"], _difference),
}
