"""One parameter's per-sample contributions in the form its layer gives them.

A backward of a loss L gives contributions h_i with sum_i h_i = grad L. The per-sample gradients are g_i = B h_i, so
that their mean is grad L whatever the reduction of the loss. `ways` and `settled` are for the planner; the rest is
asked of what `settled` gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..gradients import Moments, aligned, moments_of
from ..reference import accumulate_dtype, block_elements, product, product_with_wider
from .cost import Cost, of_ghost, of_gradients
from .workspace import Empty, Workspace, fresh


def of_gram(gram: Tensor) -> Moments:
    """Moments of contributions with the Gramian `gram`, in its dtype."""
    squared, alignments, squared_norms, _ = torch.ops.rgd_ext.gram_moments(gram)
    return squared.to(gram.dtype), alignments.to(gram.dtype), squared_norms.to(gram.dtype)


class Factor(Protocol):
    """Contributions h_i of one parameter, (B, *shape) in effect."""

    # Why there is but one way, for the user; empty where there are several.
    why: str

    @property
    def batch_size(self) -> int:
        """B."""
        ...

    @property
    def example(self) -> Tensor:
        """A tensor of their dtype and device."""
        ...

    @property
    def signature(self) -> tuple:
        """What the costs depend on."""
        ...

    def ways(self, needs_gram: bool) -> dict[str, Cost]:
        """What each way to the statistics and the combination costs, by its name."""
        ...

    def plain(self) -> Cost:
        """What the parameter's ordinary gradient costs; held are inputs and output gradients."""
        ...

    def settled(self, way: str, empty: Empty) -> Factor:
        """These contributions as `way` has them, in memory from `empty`."""
        ...

    def align(self, vector: Tensor) -> Tensor:
        """<h_i, v>, (B,), in the accumulation dtype."""
        ...

    def dense(self) -> Tensor:
        """(B, *shape)."""
        ...


class Unformed(Factor, Protocol):
    """Contributions whose statistics and combination come from something else than a tensor of all of them."""

    def gram(self) -> Tensor:
        """<h_i, h_j>, (B, B), in the accumulation dtype."""
        ...

    def moments(self) -> Moments:
        """Of all that the statistics but the Gramian need."""
        ...

    def combine(self, weights: Tensor) -> Tensor:
        """sum_i w_i h_i, (*shape), for weights in the accumulation dtype and on the device of the contributions."""
        ...


class Dense:
    """Contributions as a tensor (B, *shape).

    Args:
        contributions: the tensor.
        is_own: whether it may be overwritten.
        why: there is but this way, for the user.
    """

    def __init__(self, contributions: Tensor, is_own: bool = False, why: str = "formed by the layer's rule") -> None:
        self.contributions, self.is_own, self.why = contributions, is_own, why

    @property
    def batch_size(self) -> int:
        return self.contributions.shape[0]

    @property
    def example(self) -> Tensor:
        return self.contributions

    @property
    def signature(self) -> tuple:
        return (self.contributions.shape,)

    def ways(self, needs_gram: bool) -> dict[str, Cost]:
        return {"materialise": of_gradients(self.contributions.shape, self.contributions.dtype, needs_gram)}

    def plain(self) -> Cost:
        return Cost(stream=self.contributions.nbytes, calls=1)

    def settled(self, way: str, empty: Empty) -> Factor:
        return self

    def align(self, vector: Tensor) -> Tensor:
        return aligned(self.contributions, vector)

    def dense(self) -> Tensor:
        return self.contributions


class Blockwise:
    """Statistics from gradients that are formed a block at a time, and dropped."""

    batch_size: int
    output_grads: Tensor

    @property
    def example(self) -> Tensor:
        return self.output_grads

    def blocks(self) -> Iterator[Tensor]:
        """Columns of the (B, d) matrix of the h_i as (B, ...) tensors, in the accumulation dtype; others are zero.

        A block is valid until the next is asked for.
        """
        raise NotImplementedError

    def gram(self) -> Tensor:
        total = None
        for block in self.blocks():
            gram = ops.gram(block)
            total = gram if total is None else total.add_(gram)
        return total

    def moments(self) -> Moments:
        total = None
        for block in self.blocks():
            part = moments_of([block])
            total = part if total is None else tuple(a + b for a, b in zip(total, part, strict=True))
        return total

    def _on_blocks(self, number: int, needs_gram: bool) -> Cost:
        """The cost of the statistics of gradients with `number` elements, a block at a time."""
        device = self.output_grads.device
        # On a GPU a block does not fit in the caches: it is written to memory and read again.
        stream = 0 if device.type == "cpu" else 2 * number * accumulate_dtype(self.output_grads.dtype).itemsize
        blocks = 1 + number // block_elements(device)
        return Cost(gram=self.batch_size * number * needs_gram, stream=stream, calls=3 * blocks)


class Outer(Blockwise):
    """h_i = sum_t e_it a_it^T viewed as `shape`: every weight that multiplies T vectors of each sample.

    Args:
        inputs: A, (B, T, n), or (B, n) for T = 1.
        output_grads: E, (B, T, m), or (B, m).
        shape: of the parameter, m n elements.
        dtype: of the h_i. Under autocast on CUDA, A and E may be of 16 bits where the h_i are float32, for T > 1.
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
    def why(self) -> str:
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

    @property
    def signature(self) -> tuple:
        return self._inputs.shape, self._output_grads.shape, self._output_grads.dtype

    def ways(self, needs_gram: bool) -> dict[str, Cost]:
        ghost = of_ghost(*self.inputs.shape, self.output_grads.shape[2], self.output_grads.dtype.itemsize)
        return {"ghost": ghost} if self.is_single else self.ways_to_form(needs_gram) | {"ghost": ghost}

    def ways_to_form(self, needs_gram: bool) -> dict[str, Cost]:
        """Those of `ways` that form gradients, which serve any T."""
        shape, dtype = torch.Size((self.batch_size, *self.shape)), self.dtype
        operations, held = self.plain().product, self.plain().held
        combination = Cost(product=operations, stream=2 * self.output_grads.nbytes, calls=2, held=held)
        formed = Cost(product=operations, stream=shape.numel() * dtype.itemsize, calls=1)
        return {
            "materialise": formed + of_gradients(shape, dtype, needs_gram),
            "recompute": Cost(product=operations) + self._on_blocks(shape.numel(), needs_gram) + combination,
        }

    def plain(self) -> Cost:
        held = self.inputs.nbytes + self.output_grads.nbytes
        return Cost(product=2 * self.inputs.numel() * self.output_grads.shape[2], calls=1, held=held)

    def settled(self, way: str, empty: Empty) -> Factor:
        if self.is_single or way == "recompute":
            return self
        if way == "ghost":
            return Ghost(self.inputs, self.output_grads, self.shape, self.dtype)
        return Dense(self.formed(empty), is_own=True)

    def formed(self, empty: Empty) -> Tensor:
        """(B, *shape), in memory from `empty`."""
        out = empty((self.batch_size, *self.shape), self.example)
        matrices = out.view(self.batch_size, self.output_grads.shape[2], self.inputs.shape[2])
        product(self.output_grads.mT, self.inputs, self.dtype, out=matrices)
        return out

    @property
    def _accumulated(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    def _operands(self) -> tuple[Tensor, Tensor]:
        """A and E for products in the accumulation dtype; CUDA needs no conversion for these."""
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
        # One plain weight-gradient product over all samples, as in the backward of SGD.
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
    """An `Outer` whose gradients are never formed."""

    # Temporaries of a chunked Gramian, in elements.
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
        return of_gram(self.gram())


class Bias:
    """h_i = sum_t e_it: the bias beside an `Outer` weight."""

    why = "with its weight"

    def __init__(self, weight: Outer) -> None:
        self.weight = weight

    @property
    def output_grads(self) -> Tensor:
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

    def ways(self, needs_gram: bool) -> dict[str, Cost]:
        batch_size, length, m = self.output_grads.shape
        if length == 1:
            return {"ghost": Cost(stream=2 * self.output_grads.nbytes, calls=1)}
        summed = Cost(stream=self.output_grads.nbytes, calls=1)
        return {"materialise": summed + of_gradients(torch.Size((batch_size, m)), self.weight.dtype, needs_gram)}

    def plain(self) -> Cost:
        return Cost(stream=self.output_grads.nbytes, calls=1)

    def settled(self, way: str, empty: Empty) -> Factor:
        return self if way == "ghost" else Dense(self.dense(), is_own=True)

    def align(self, vector: Tensor) -> Tensor:
        return aligned(self.dense(), vector)

    def dense(self) -> Tensor:
        return self.weight.rows()[1] if self.weight.is_single else self.output_grads.sum(1, dtype=self.weight.dtype)


def of_dtype(linear: dict[str, Outer | Bias], dtype: torch.dtype) -> dict[str, Outer | Bias]:
    """The contributions of a linear layer, in another dtype than that of its inputs and output gradients."""
    for factor in linear.values():
        (factor.weight if isinstance(factor, Bias) else factor).dtype = dtype
    return linear
