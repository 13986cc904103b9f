"""Vectors of the parameter space, in the forms in which users pass them and as rows of float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from .. import ops
from ..gradients import PerSampleGradients
from ..linalg import accumulate_dtype


class ParameterSpace:
    """The space R^d of the trainable parameters.

    A vector is a tensor (d,) or a list with one tensor per parameter, and k vectors are a tensor (d, k). For
    computations they are rows, a float64 tensor (k, d) on the device of the parameters.

    Args:
        like: one tensor with the shape, dtype and device of each parameter.
    """

    def __init__(self, like: list[Tensor]) -> None:
        self.like = like
        self.dimension = sum(t.numel() for t in like)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, on which all sums are accumulated."""
        return self.like[0].device

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype in which sums over the gradients of one batch are accumulated."""
        return accumulate_dtype(self.like[0].dtype)

    def zeros(self, *size: int) -> Tensor:
        """A float64 tensor of zeros on the device."""
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    def rows(self, vectors: Tensor | Sequence[Tensor]) -> Tensor:
        """Vectors in any of their forms as rows, (k, d).

        Raises:
            ValueError, TypeError: for other shapes, or values that are no real floating-point tensors.
        """
        parts = ops.as_list(vectors)
        for part in parts:
            if not isinstance(part, Tensor) or not part.is_floating_point():
                kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"D takes floating-point tensors, got {kind}: convert it, or use linear_operator()")
        if not isinstance(vectors, Tensor):
            shapes, expected = [tuple(p.shape) for p in parts], [tuple(t.shape) for t in self.like]
            if shapes != expected:
                raise ValueError(f"vector has the shapes {shapes}: pass one tensor per parameter, {expected}")
            vectors = flat(parts)
        size = self.dimension
        if vectors.ndim not in (1, 2) or vectors.shape[0] != size or vectors.numel() == 0:
            raise ValueError(f"vectors have shape {tuple(vectors.shape)}: pass ({size},) or ({size}, k)")
        # They are rounded as the gradients are, so that <g_i, v> and <g, v> are products with the same v.
        return vectors.detach().reshape(size, -1).T.to(self.like[0]).double().contiguous()

    @overload
    def in_form_of(self, vectors: Tensor, rows: Tensor) -> Tensor: ...

    @overload
    def in_form_of(self, vectors: Sequence[Tensor], rows: Tensor) -> list[Tensor]: ...

    def in_form_of(self, vectors: Tensor | Sequence[Tensor], rows: Tensor) -> Tensor | list[Tensor]:
        """`rows` in the form, dtype and device of `vectors`, which is one of the forms that `rows(vectors)` takes."""
        if isinstance(vectors, Tensor):
            return rows.T.reshape(vectors.shape).to(vectors)
        return [part.to(v) for part, v in zip(self.split(rows[0]), vectors, strict=True)]

    def split(self, row: Tensor) -> list[Tensor]:
        """A row, (d,), as one tensor per parameter."""
        parts = row.split([t.numel() for t in self.like])
        return [part.view(t.shape) for part, t in zip(parts, self.like, strict=True)]

    def gradient_rows(self, grads: PerSampleGradients) -> Tensor:
        """G, (B, d), in float64."""
        tensors = grads.dense()
        if tensors is not None:
            return torch.cat([t.flatten(1).double().to(self.device) for t in tensors], 1)
        identity = torch.eye(grads.batch_size, dtype=self.accumulate_dtype, device=self.device)
        return torch.stack([flat(grads.combine(row)) for row in identity])


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors of any shapes as one float64 vector, on the device of the first."""
    parts = [t.detach().reshape(-1) for t in tensors]
    return torch.cat([part.to(parts[0].device, torch.float64) for part in parts])
