"""The contributions to weights that multiply vectors, as those of linear layers do, and to the biases beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..gradients import Moments, aligned
from ..linalg import accumulate_dtype, block_elements, product, product_with_wider
from .blockwise import Blockwise
from .buffers import Empty, Workspace, fresh
from .cost import Cost, dense_cost, ghost_cost
from .factor import Dense, Factor, moments_from_gram
from .vectors import VectorLayers


class Outer(Blockwise):
    """h_i = sum_t e_it a_it^T viewed as `shape`, for a weight that multiplies T vectors of each sample.

    Args:
        inputs: A, (B, T, n), or (B, n) for T = 1.
        output_grads: E, (B, T, m), or (B, m).
        shape: the shape of the parameter, which has m n elements.
        dtype: the dtype of the h_i. Under autocast on CUDA, A and E may have 16 bits where the h_i are float32, for
            T > 1.
    """

    def __init__(
        self, inputs: Tensor, output_grads: Tensor, shape: torch.Size, dtype: torch.dtype | None = None
    ) -> None:
        self._inputs, self._output_grads, self.shape = inputs, output_grads, shape
        self.dtype = dtype or output_grads.dtype

    @property
    def inputs(self) -> Tensor:
        """A, (B, T, n)."""
        return self._inputs if self._inputs.ndim == 3 else self._inputs[:, None]

    @property
    def output_grads(self) -> Tensor:
        """E, (B, T, m)."""
        return self._output_grads if self._output_grads.ndim == 3 else self._output_grads[:, None]

    @property
    def example(self) -> Tensor:
        grads = self._output_grads
        return grads if grads.dtype == self.dtype else grads.new_empty(0, dtype=self.dtype)

    @property
    def why(self) -> str:  # type: ignore[override]  # other factors store it
        return "one vector per sample" if self.is_single else ""

    @property
    def batch_size(self) -> int:
        return self._inputs.shape[0]

    @property
    def is_single(self) -> bool:
        """Whether T = 1."""
        return self._inputs.ndim == 2 or self._inputs.shape[1] == 1

    def rows(self) -> tuple[Tensor, Tensor]:
        """A as (B, n) and E as (B, m), for T = 1."""
        if self._inputs.ndim == 2:
            return self._inputs, self._output_grads
        return self._inputs[:, 0], self._output_grads[:, 0]

    def as_vectors(self) -> VectorLayers | None:
        return self._layer() if self.is_single else None

    def _layer(self) -> VectorLayers:
        inputs, output_grads = self.rows()
        return VectorLayers([inputs], [output_grads], [False])

    def gram(self) -> Tensor:
        return self._layer().gram() if self.is_single else super().gram()

    def moments(self) -> Moments:
        return moments_from_gram(self.gram()) if self.is_single else super().moments()

    @property
    def signature(self) -> tuple:
        return self._inputs.shape, self._output_grads.shape, self._output_grads.dtype

    def strategies(self, needs_gram: bool) -> dict[str, Cost]:
        batch_size, length, n = self.inputs.shape
        ghost = ghost_cost(batch_size, length, n, self.output_grads.shape[2], self.output_grads.dtype.itemsize)
        return {"ghost": ghost} if self.is_single else self.forming_strategies(needs_gram) | {"ghost": ghost}

    def forming_strategies(self, needs_gram: bool) -> dict[str, Cost]:
        """Those of `strategies` that form gradients; they serve any T."""
        shape, dtype = torch.Size((self.batch_size, *self.shape)), self.dtype
        operations, held = self.plain().product, self.plain().held
        combination = Cost(product=operations, stream=2 * self.output_grads.nbytes, calls=2, held=held)
        formed = Cost(product=operations, stream=shape.numel() * dtype.itemsize, calls=1)
        return {
            "materialise": formed + dense_cost(shape, dtype, needs_gram),
            "recompute": Cost(product=operations) + self._on_blocks(shape.numel(), needs_gram) + combination,
        }

    def plain(self) -> Cost:
        held = self.inputs.nbytes + self.output_grads.nbytes
        return Cost(product=2 * self.inputs.numel() * self.output_grads.shape[2], calls=1, held=held)

    def apply(self, strategy: str, empty: Empty) -> Factor:
        if self.is_single or strategy == "recompute":
            return self
        if strategy == "ghost":
            return Ghost(self.inputs, self.output_grads, self.shape, self.dtype)
        return Dense(self.formed(empty), is_own=True)

    def formed(self, empty: Empty) -> Tensor:
        """The h_i, (B, *shape), in memory from `empty`."""
        out = empty((self.batch_size, *self.shape), self.example)
        matrices = out.view(self.batch_size, self.output_grads.shape[2], self.inputs.shape[2])
        product(self.output_grads.mT, self.inputs, self.dtype, out=matrices)
        return out

    @property
    def _accumulated(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    def _operands(self) -> tuple[Tensor, Tensor]:
        """A and E for products in the accumulation dtype. CUDA needs no conversion for these."""
        if self.output_grads.is_cuda:
            return self.inputs, self.output_grads
        return self.inputs.to(self._accumulated), self.output_grads.to(self._accumulated)

    def blocks(self) -> Iterator[Tensor]:
        inputs, output_grads = self._operands()
        rows = max(1, block_elements(inputs.device) // (self.batch_size * inputs.shape[2]))
        workspace = Workspace()
        for some in output_grads.split(rows, 2):
            workspace.restart()
            shape = self.batch_size, some.shape[2], inputs.shape[2]
            out = workspace.empty(shape, inputs) if inputs.is_cpu else None
            yield product(some.mT, inputs, self._accumulated, out=out)

    def align(self, vector: Tensor) -> Tensor:
        inputs, output_grads = self._operands()
        matrix = vector.reshape(output_grads.shape[-1], inputs.shape[-1]).to(self._accumulated)
        products = product_with_wider(inputs.flatten(0, 1), matrix.T).view_as(output_grads)
        return products.mul_(output_grads).sum((1, 2))

    def combine(self, weights: Tensor) -> Tensor:
        # This is one plain weight-gradient product over all samples, as in the backward of SGD.
        if self._accumulated != self.output_grads.dtype:
            return self._combine_halves(weights)
        weighted = self.output_grads * weights.view(-1, 1, 1)
        return torch.mm(weighted.flatten(0, 1).T, self.inputs.flatten(0, 1)).view(self.shape)

    def _combine_halves(self, weights: Tensor) -> Tensor:
        # 16 bits would lose the small difference of a weight from 1, so there are two products instead of one. The
        # inputs are weighted: small gradients have fewer bits in float16, and a head has fewer inputs than outputs.
        weighted = (self.inputs * weights.view(-1, 1, 1)).flatten(0, 1)
        return product_with_wider(self.output_grads.flatten(0, 1).T, weighted).view(self.shape).to(self.dtype)

    def dense(self) -> Tensor:
        return self.formed(fresh)


class Ghost(Outer):
    """An `Outer` whose gradients are never formed: the Gramian is that of inputs and output gradients."""

    gram_is_free = True

    # How many elements the temporaries of a Gramian may have; larger ones are computed for some samples at a time.
    _CHUNK = 1 << 24

    def gram(self) -> Tensor:
        """K_ij = sum_ts <a_it, a_js> <e_it, e_js>."""
        inputs, output_grads = self._operands()
        batch_size, length, _ = inputs.shape
        inputs, output_grads = inputs.flatten(0, 1), output_grads.flatten(0, 1)
        samples = max(1, self._CHUNK // (length * length * batch_size))
        rows = []
        for a, e in zip(inputs.split(samples * length), output_grads.split(samples * length), strict=True):
            products = product(a, inputs.T, self._accumulated).mul_(product(e, output_grads.T, self._accumulated))
            rows.append(products.view(-1, length, batch_size, length).sum((1, 3)))
        return torch.cat(rows)

    def moments(self) -> Moments:
        return moments_from_gram(self.gram())


class Bias(Factor):
    """h_i = sum_t e_it, for the bias beside a weight whose contributions are `Outer`."""

    why = "with its weight"

    def __init__(self, weight: Outer) -> None:
        self.weight = weight

    @property
    def output_grads(self) -> Tensor:
        """E, (B, T, m)."""
        return self.weight.output_grads

    @property
    def example(self) -> Tensor:
        return self.weight.example

    @property
    def batch_size(self) -> int:
        return self.weight.batch_size

    @property
    def signature(self) -> tuple:
        return self.weight.signature

    def strategies(self, needs_gram: bool) -> dict[str, Cost]:
        batch_size, length, m = self.output_grads.shape
        if length == 1:
            return {"ghost": Cost(stream=2 * self.output_grads.nbytes, calls=1)}
        summed = Cost(stream=self.output_grads.nbytes, calls=1)
        return {"materialise": summed + dense_cost(torch.Size((batch_size, m)), self.weight.dtype, needs_gram)}

    def plain(self) -> Cost:
        return Cost(stream=self.output_grads.nbytes, calls=1)

    def apply(self, strategy: str, empty: Empty) -> Factor:
        return self if strategy == "ghost" else Dense(self.dense(), is_own=True)

    def as_vectors(self) -> VectorLayers:
        grads = self.dense()
        return VectorLayers([grads[:, :0]], [grads], [True])

    def align(self, vector: Tensor) -> Tensor:
        return aligned(self.dense(), vector)

    def dense(self) -> Tensor:
        return self.weight.rows()[1] if self.weight.is_single else self.output_grads.sum(1, dtype=self.weight.dtype)


def with_dtype(linear: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor | Factor]:
    """The contributions of a linear layer, in another dtype than that of its inputs and output gradients."""
    given = linear["weight"]
    weight = Outer(given.inputs, given.output_grads, given.shape, dtype)
    return {"weight": weight, "bias": Bias(weight)}
