"""The kinds of products of samples x with a value v that they share, and the contributions to v in each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_letters
from types import SimpleNamespace

import torch
from torch import Tensor

from ...contributions.outer import Bias, Outer
from ...layers.embedding import embedding
from ..rule_output import RuleOutput
from .shared_value import memory_order

# The letter of the samples' dimension in a contraction. Functions that see one sample have no such dimension.
SAMPLES = ascii_letters[-1]


class ProductKind(ABC):
    """What a function computes from samples x and a shared value v, with the options that it was called with."""

    @abstractmethod
    def batched(self, x: Tensor) -> tuple[ProductKind, bool] | None:
        """The kind of the product of all samples, given that of one sample.

        Args:
            x: one sample. All samples are (B, *x.shape).

        Returns:
            The kind, and whether it takes the samples without dimension 0 of x, which has size 1 then. None if there is
            no such kind.
        """

    def has_samples_in_front(self) -> bool:
        """Whether dimension 0 of x is one of samples, and dimension 0 of the product."""
        return True

    def is_layer(self, value: Tensor) -> bool:
        """Whether `layer` can be called for a value with these strides."""
        return False

    def dims_behind_bias(self) -> int:
        """The number of dimensions of the product behind the one that a bias is added along."""
        return 0

    def adds_bias(self, value: Tensor) -> bool:
        """Whether a bias, a vector, has the dimension of the product that v has and x has not."""
        return False

    def is_linear(self, value: Tensor) -> bool:
        """Whether the product is x v^T with a matrix v, (m, n), as in a linear layer."""
        return False

    def is_transposed(self, value: Tensor) -> bool:
        """Whether the product is x v with a matrix v, (n, m)."""
        return False

    def row_length(self, value: Tensor) -> int | None:
        """The length of the rows of the matrix that v is in memory. None where parts of a parameter are no layer."""
        return None

    def layer(self, value: Tensor, x: Tensor, grad: Tensor, shape: torch.Size) -> RuleOutput:
        """The contributions that the rule of the layer gives, where `is_layer`.

        Args:
            value: v.
            x, grad: the inputs and the gradient of the product, (B, ...).
            shape: the shape of the parameter, which has the elements of v as they lie in memory.

        Returns:
            The contributions to "weight", of that shape, and to "bias", which is added to the product.
        """
        raise NotImplementedError

    @abstractmethod
    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        """The contributions to v, (B, *v.shape), given x and the gradient of the product, (B, ...)."""


@dataclass(frozen=True)
class Contraction(ProductKind):
    """The sum of x v over the letters that `out` has not, as in `torch.einsum`.

    Attributes:
        x, v, out: the letters of the dimensions of x, v and the product; no operand has a letter twice.
    """

    x: str
    v: str
    out: str

    def batched(self, x: Tensor) -> tuple[Contraction, bool]:
        if self.has_samples_in_front() and x.shape[0] == 1:
            return self, True
        return Contraction(SAMPLES + self.x, self.v, SAMPLES + self.out), False

    def has_samples_in_front(self) -> bool:
        return self.x[:1] == self.out[:1] != "" and self.x[0] not in self.v

    def is_linear(self, value: Tensor) -> bool:
        return self._is_matrix(value, self.out[-1:] + self.x[-1:])

    def is_transposed(self, value: Tensor) -> bool:
        return self._is_matrix(value, self.x[-1:] + self.out[-1:])

    def _is_matrix(self, value: Tensor, letters: str) -> bool:
        """Whether v is a matrix with these letters between the last dimensions of x and of the product."""
        return self.x[:-1] == self.out[:-1] and self.v == letters and value.is_contiguous()

    def is_layer(self, value: Tensor) -> bool:
        summed, free = self._sides(value)
        return self._order(value) in (free + summed, summed + free)

    def row_length(self, value: Tensor) -> int:
        summed, free = self._sides(value)
        return _number_of_elements(value, self.v, summed if self._order(value) == free + summed else free)

    def adds_bias(self, value: Tensor) -> bool:
        return self._sides(value)[1] == self.out[-1:]

    def _order(self, value: Tensor) -> str:
        """The letters of v in the order in which its dimensions lie in memory."""
        return "".join(self.v[dim] for dim in memory_order(value))

    def _sides(self, value: Tensor) -> tuple[str, str]:
        """The letters of v that are summed over, and the free ones, which x has not, in the order of memory."""
        order = self._order(value)
        return "".join(c for c in order if c not in self.out), "".join(c for c in order if c not in self.x)

    def layer(self, value: Tensor, x: Tensor, grad: Tensor, shape: torch.Size) -> RuleOutput:
        summed, free = self._sides(value)
        places = "".join(c for c in self.out[1:] if c in self.x)
        inputs, grads = self._rows(x, self.x, places, summed), self._rows(grad, self.out, places, free)
        if self._order(value) == free + summed:
            factor = Outer(inputs, grads, shape)
            return {"weight": factor, "bias": Bias(factor)}
        return {"weight": Outer(grads, inputs, shape), "bias": grads.sum(1)}

    def _rows(self, tensor: Tensor, letters: str, places: str, columns: str) -> Tensor:
        """`tensor` as (B, places, columns)."""
        order = [letters.index(c) for c in letters[0] + places + columns]
        return tensor.permute(order).reshape(len(tensor), -1, _number_of_elements(tensor, letters, columns))

    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return torch.einsum(f"{self.out},{self.x}->{self.out[0]}{self.v}", grad, x)


def _number_of_elements(tensor: Tensor, letters: str, some: str) -> int:
    """The product of the sizes of the dimensions with the letters `some`."""
    return torch.Size([tensor.shape[letters.index(c)] for c in some]).numel()


@dataclass(frozen=True)
class Convolution(ProductKind):
    """A convolution of x with the weight v.

    Attributes:
        rule: the rule of the layer.
        options: stride, padding, dilation and groups, under the names that layers have for them.
        space: the number of dimensions of space.
    """

    rule: Callable
    options: dict
    space: int

    def batched(self, x: Tensor) -> tuple[Convolution, bool] | None:
        if x.ndim == self.space + 1:
            return self, False
        return (self, True) if x.shape[0] == 1 else None

    def is_layer(self, value: Tensor) -> bool:
        return value.is_contiguous()

    def dims_behind_bias(self) -> int:
        return self.space

    def adds_bias(self, value: Tensor) -> bool:
        return True

    def layer(self, value: Tensor, x: Tensor, grad: Tensor, shape: torch.Size) -> RuleOutput:
        weight = SimpleNamespace(shape=shape, requires_grad=True)
        options = {"kernel_size": value.shape[2:], "padding_mode": "zeros"} | self.options
        # Rules read the geometry from a layer, and return contributions to its bias if it has one.
        return self.rule(SimpleNamespace(weight=weight, bias=value, **options), (x,), grad)

    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return self.layer(value, x, grad, value.shape)["weight"].dense()


@dataclass(frozen=True)
class Lookup(ProductKind):
    """The rows of the table v at the indices x.

    Attributes:
        padding: the row that gets no gradient, or None.
        is_sparse: whether the table's gradient is sparse.
    """

    padding: int | None
    is_sparse: bool = False

    def batched(self, x: Tensor) -> tuple[Lookup, bool]:
        return self, x.ndim > 0 and x.shape[0] == 1

    def is_layer(self, value: Tensor) -> bool:
        return value.ndim == 2 and value.is_contiguous()

    def layer(self, value: Tensor, x: Tensor, grad: Tensor, shape: torch.Size) -> RuleOutput:
        rows = len(value)
        padding = None if self.padding is None else self.padding % rows
        table = SimpleNamespace(shape=torch.Size((rows, shape.numel() // rows)))
        layer = SimpleNamespace(weight=table, padding_idx=padding, scale_grad_by_freq=False, sparse=self.is_sparse)
        return embedding(layer, (x.remainder(rows),), grad)

    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return self.layer(value, x, grad, value.shape)["weight"].dense().view(-1, *value.shape)


@dataclass(frozen=True)
class Elementwise(ProductKind):
    """x v, x + v or x - v, with v broadcast against x.

    Attributes:
        sign: the sign of v in a sum; None for a product.
    """

    sign: float | None

    def batched(self, x: Tensor) -> None:
        return None  # a copy of v for each sample costs as little

    def dense(self, value: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        products = grad * (x if self.sign is None else self.sign)
        sizes = [1] * (grad.ndim - value.ndim) + list(value.shape)
        broadcast = [dim for dim in range(1, grad.ndim) if sizes[dim] == 1]
        return (products.sum(broadcast) if broadcast else products).reshape(len(grad), *value.shape)
