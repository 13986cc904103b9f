"""Parsers that recognise products of samples with a shared value among calls of torch's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from string import ascii_letters

import torch
from torch import Tensor
from torch.nn.modules.utils import _ntuple

from ...layers.convolution import convolution, transposed_convolution
from .product_kinds import SAMPLES, Contraction, Convolution, Elementwise, Lookup
from .products import Product
from .samples import UnequalSamples
from .shared_value import SharedValue


def parse_product(
    function: Callable, args: tuple, kwargs: dict, value_of: Callable[[object], SharedValue | None]
) -> Product | None:
    """The product that a call computes, if it is one of samples with a shared value; None for other calls.

    Args:
        function: the function that is called.
        args, kwargs: its arguments.
        value_of: argument -> the shared value that it stands for, or None.

    Raises:
        RuntimeError: if the function changes a value.
        UnequalSamples: if the gradient of the value is not a sum over the samples.
    """
    parse = _PARSERS.get(function.__name__)
    if parse is None:
        return None
    try:
        product = parse(function, value_of, *args, **kwargs)
    except TypeError:  # an overload with other arguments
        return None
    is_real = product is not None and product.x.layout == torch.strided and not product.x.is_complex()
    return product if is_real and product.value.tensor.is_floating_point() else None


def _linear(function, value_of, input, weight, bias=None) -> Product | None:  # noqa: A002
    value = value_of(weight)
    if value is None or value_of(input) is not None:
        return None
    leading = ascii_letters[: input.ndim - 1]
    kind = Contraction(leading + "y", "xy"[2 - value.tensor.ndim :], leading + "x" * (value.tensor.ndim - 1))
    return _with_bias(kind, input, value, bias, value_of, partial(function, input))


def _with_bias(kind, x, value, bias, value_of, run) -> Product:
    if bias is None or value_of(bias) is not None:
        return Product(kind, x, value, value_of(bias), run)
    return Product(kind, x, value, None, lambda v, _: run(v, bias))


def _matmul(function, value_of, left, right) -> Product | None:
    values = value_of(left), value_of(right)
    if (values[0] is None) == (values[1] is None):
        return None
    a, b, out = _letters_of_matmul(left.ndim, right.ndim)
    if values[0] is None:
        return Product(Contraction(a, b, out), left, values[1], None, lambda v, _: function(left, v))
    return Product(Contraction(b, a, out), right, values[0], None, lambda v, _: function(v, right))


def _letters_of_matmul(left: int, right: int) -> tuple[str, str, str]:
    """The letters of both factors, given their numbers of dimensions, and of the product.

    A dimension that only one factor has is broadcast.
    """
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

    return Product(product.kind, product.x, product.value, added, run)


def _einsum(function, value_of, equation, *operands) -> Product | None:
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    values = [value_of(x) for x in operands]
    if not isinstance(equation, str) or len(operands) != 2 or (values[0] is None) == (values[1] is None):
        return None
    place = 0 if values[1] is None else 1  # the place of the value
    letters = _letters_of_einsum(equation, [x.shape for x in operands])
    if letters is None:
        return None
    kind = Contraction(letters[1 - place], letters[place], letters[2])

    def run(value: Tensor, _: None) -> Tensor:
        return function(equation, *(value if n == place else x for n, x in enumerate(operands)))

    return Product(kind, operands[1 - place], values[place], None, run)


def _letters_of_einsum(equation: str, shapes: Sequence[torch.Size]) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result, with letters for ellipses; None if it is no `Contraction`."""
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
    is_plain = all(len(set(term)) == len(term) for term in terms) and SAMPLES not in equation
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
    kind = Convolution(rule, geometry, space)
    return _with_bias(kind, input, value, bias, value_of, lambda v, b: function(input, v, b, **options))


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
    if value is None:
        return None
    if scale_grad_by_freq:
        raise UnequalSamples(
            "F.embedding with scale_grad_by_freq counts indices over the whole batch: use nn.Embedding"
        )
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
    place = 0 if values[1] is None else 1  # the place of the value
    value, x = values[place], (right, left)[place]
    if values[1 - place] is not None or not isinstance(x, Tensor) or not _is_broadcast(value.tensor, x):
        return None

    def run(value: Tensor, _: None) -> Tensor:
        return function(left, value) if place else function(value, right)

    return Product(Elementwise(signs[place]), x, value, None, run)


def _is_broadcast(value: Tensor, x: Tensor) -> bool:
    """Whether `value` is broadcast along the first dimension of `x`."""
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
