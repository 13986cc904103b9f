"""The linear algebra that the operators use: accumulation, products of 16-bit operands, sums of rows, spectra."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over gradients of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_matrix(grads: Tensor) -> Tensor:
    """Gradients (B, *shape) as a (B, d) matrix in the accumulation dtype."""
    return grads.reshape(grads.shape[0], -1).to(accumulate_dtype(grads.dtype))


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric positive semi-definite matrix, ascending; NaN where it is not finite."""
    # Eigenvalue routines raise on non-finite input, but an overflow under a GradScaler has to reach the result.
    finite = matrix.sum(dtype=torch.float64).isfinite()
    found = torch.linalg.eigvalsh(torch.where(finite, matrix, 0.0).double()).clamp(min=0)
    return torch.where(finite, found, torch.nan).to(matrix.dtype)


def rank(eigenvalues: Tensor, size: int, largest: Tensor, ulp: float) -> Tensor:
    """The number of eigenvalues of D that are above its rounding.

    Args:
        eigenvalues: the eigenvalues, from a matrix of `size` rows.
        size: the number of rows.
        largest: the largest |g_i|^2.
        ulp: the rounding error of 1.
    """
    return (eigenvalues > ulp * torch.maximum(size * eigenvalues.max(), largest)).sum()


def trace_rounding(squared_norm: Tensor, ulp: float) -> Tensor:
    """The largest trace of D that may come from rounding alone, for equal gradients with this squared norm.

    Up to this trace, D counts as zero. The kernels of `sample_weights` in csrc have the same factor.
    """
    return 8 * ulp * squared_norm


def block_elements(device: torch.device) -> int:
    """The number of elements of gradients that are formed at a time.

    So many stay in the caches of a CPU. A GPU takes longer to read them, 64 MiB of float32, than to launch a kernel.
    """
    return 1 << 20 if device.type == "cpu" else 1 << 24


def product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left @ right for matrices or batches of them, in `dtype`: that of both, or float32 for 16-bit operands on CUDA.

    Matrix units multiply 16-bit operands without a conversion. The products are exact in float32, and summed in it.
    """
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    return multiply(left, right, out=out) if left.dtype == dtype else multiply(left, right, out_dtype=dtype, out=out)


def product_with_wider(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for matrices, in the dtype of `right`. On a GPU `right` is split in two if `left` is narrower.

    16 bits would lose the small correction by which the weight of a sample differs from 1.
    """
    if left.dtype == right.dtype or left.is_cpu:
        return torch.mm(left.to(right.dtype), right)
    high = right.to(left.dtype)
    low = (right - high).to(left.dtype)
    return product(left, high, right.dtype).add_(product(left, low, right.dtype))


def sum_rows(rows: Tensor, indices: Tensor, number: int) -> Tensor:
    """Sums of rows, (number, *shape): row r is the sum of the `rows`, (N, *shape), whose index is r.

    The order of summation is always the same, and the host does not wait for the device.
    """
    if rows.is_cpu:
        return rows.new_zeros(number, *rows.shape[1:]).index_add_(0, indices, rows)
    # On CUDA index_add_ uses atomics. This is the kernel that computes SGD's gradient of an embedding.
    flat = rows.reshape(len(rows), rows.shape[1:].numel())
    return torch.ops.aten.embedding_dense_backward(flat, indices, number, -1, False).view(number, *rows.shape[1:])
