"""Forms of products of samples x with a value v that they share.

Every form has these methods:

- `of_all(x)`: the form of the same product of all samples (B, *x.shape), given x of one sample, and whether dimension 0
  of x, which has size 1, is dropped there; None if there is no such form;
- `has_samples_in_front()`: whether dimension 0 of x is one of samples, and dimension 0 of the product;
- `is_layer(v)`: whether `layer` serves a value with these strides; `adds_bias(v)`: whether a bias, a vector, has the
  dimension of the product that v has and x has not;
- `layer(v, x, grad, shape)`: the contributions to "weight", of that shape, which has the elements of v as they lie in
  memory, and to "bias", which is added to the product; x and grad, (B, ...), have the samples in front;
- `dense(v, x, grad)`: the contributions to v, (B, *v.shape).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_letters
from types import SimpleNamespace
from typing import TypeAlias

import torch
from torch import Tensor

from .factors import Bias, Outer
from .nodes import Contributions
from .rules import embedding
from .values import memory_order

# The letter of the samples' dimension where a function sees one sample; of no dimension of its own.
SAMPLES = ascii_letters[-1]


@dataclass(frozen=True)
class Contraction:
    """The sum of x v over letters that `out` has not, as in `torch.einsum`; no operand has a letter twice."""

    x: str
    v: str
    out: str

    def of_all(self, x: Tensor) -> tuple[Contraction, bool]:
        if self.has_samples_in_front() and x.shape[0] == 1:
            return self, True
        return Contraction(SAMPLES + self.x, self.v, SAMPLES + self.out), False

    def has_samples_in_front(self) -> bool:
        return self.x[:1] == self.out[:1] != "" and self.x[0] not in self.v

    def is_linear(self, value: Tensor) -> bool:
        """Whether it is x v^T with the matrix v, (m, n)."""
        return self._is_matrix(value, self.out[-1:] + self.x[-1:])

    def is_transposed(self, value: Tensor) -> bool:
        """Whether it is x v with the matrix v, (n, m)."""
        return self._is_matrix(value, self.x[-1:] + self.out[-1:])

    def _is_matrix(self, value: Tensor, letters: str) -> bool:
        """Whether v is a matrix with these letters between the last dimensions of x and of the product."""
        return self.x[:-1] == self.out[:-1] and self.v == letters and value.is_contiguous()

    def is_layer(self, value: Tensor) -> bool:
        summed, free = self._sides(value)
        return self._order(value) in (free + summed, summed + free)

    def row_length(self, value: Tensor) -> int:
        """How many elements the rows have of the matrix that v is in memory."""
        summed, free = self._sides(value)
        return _sizes(value, self.v, summed if self._order(value) == free + summed else free)

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
class Convolution:
    """A convolution of x with the weight v.

    Attributes:
        rule: of the layer.
        options: stride, padding, dilation and groups, under the names that layers have for them.
        space: number of its dimensions.
    """

    rule: Callable
    options: dict
    space: int

    def of_all(self, x: Tensor) -> tuple[Convolution, bool] | None:
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
        # Rules read the geometry off a layer; where that has a bias they return its contributions too.
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


Form: TypeAlias = Contraction | Convolution | Lookup | Elementwise
