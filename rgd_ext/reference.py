"""The operators in plain PyTorch: the default kernel on every device, and the oracle of the tests.

Notation: G is the (B, d) matrix of per-sample gradients g_i, given as one (B, *shape) tensor per parameter;
g is their mean, C = G - 1 g^T, and D = C^T C / B is the diffusion matrix, eqs. (2) and (3).
Sums over weights and samples are accumulated in `accumulate_dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over gradients of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matrices(grads: list[Tensor]) -> list[Tensor]:
    return [g.reshape(g.shape[0], -1).to(accumulate_dtype(g.dtype)) for g in grads]


def _like_parameters(vectors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return [v.reshape(g.shape[1:]).to(g.dtype) for v, g in zip(vectors, grads, strict=True)]


def _weighted_sum(weights: Tensor, matrix: Tensor) -> Tensor:
    return (weights[:, None] * matrix).sum(0)


def _mean(matrix: Tensor) -> Tensor:
    # As a weighted sum, so that combine() with equal weights gives the same bits.
    batch_size = matrix.shape[0]
    return _weighted_sum(matrix.new_full((batch_size,), 1 / batch_size), matrix)


def moments(grads: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """g = mean_i g_i, the alignments <g_i - g, g>, and the squared norms |g_i - g|^2."""
    matrices = _matrices(grads)
    means = [_mean(m) for m in matrices]
    alignments = torch.stack([(m - g) @ g for m, g in zip(matrices, means, strict=True)]).sum(0)
    squared_norms = torch.stack([(m - g).square().sum(1) for m, g in zip(matrices, means, strict=True)]).sum(0)
    return _like_parameters(means, grads), alignments, squared_norms


def scalar_moments(grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """|g|^2, and the alignments and squared norms that `moments` gives."""
    means, alignments, squared_norms = torch.ops.rgd_ext.moments(grads)
    return torch.ops.rgd_ext.squared_norm(means), alignments, squared_norms


def squared_norm(vector: list[Tensor]) -> Tensor:
    """|v|^2, as the Gramian of one sample: torch's norm of many numbers has fewer digits."""
    return torch.ops.rgd_ext.gram([v.unsqueeze(0) for v in vector]).view(())


def combine(grads: list[Tensor], weights: Tensor) -> list[Tensor]:
    """p = sum_i w_i g_i."""
    return _like_parameters([_weighted_sum(weights, m) for m in _matrices(grads)], grads)


def diffusion_mv(grads: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """D v = (1/B) sum_i <g_i - g, v> g_i, eq. (2), for one vector (*shape) or several (k, *shape)."""
    matrices = _matrices(grads)
    number = vectors[0].shape[0] if vectors[0].ndim == grads[0].ndim else 1
    columns = [v.reshape(number, m.shape[1]).to(m.dtype).T for v, m in zip(vectors, matrices, strict=True)]
    products = torch.stack([m @ v for m, v in zip(matrices, columns, strict=True)]).sum(0)
    products = (products - products.mean(0)) / products.shape[0]  # (B, k)
    results = [products.T @ m for m in matrices]
    return [r.reshape(v.shape).to(v.dtype) for r, v in zip(results, vectors, strict=True)]


def gram(grads: list[Tensor]) -> Tensor:
    """K = G G^T, (B, B), not centred, exactly symmetric."""
    product = torch.stack([m @ m.T for m in _matrices(grads)]).sum(0)
    return (product + product.T) / 2


def ghost_gram(inputs: list[Tensor], output_grads: list[Tensor], biases: list[bool]) -> Tensor:
    """K = sum_l (A_l A_l^T + bias_l) o (E_l E_l^T), (B, B), exactly symmetric."""
    layers = zip(_matrices(inputs), _matrices(output_grads), biases, strict=True)
    product = torch.stack([(a @ a.T + bias) * (e @ e.T) for a, e, bias in layers]).sum(0)
    return (product + product.T) / 2


def ghost_combine(
    inputs: list[Tensor], output_grads: list[Tensor], biases: list[bool], weights: Tensor
) -> list[Tensor]:
    """For each layer sum_i w_i e_i if it has a bias, and sum_i w_i e_i a_i^T if it has inputs."""
    results = []
    for a, e, bias in zip(inputs, output_grads, biases, strict=True):
        column = weights[:, None].to(accumulate_dtype(e.dtype))
        results += [(e * column).sum(0).to(e.dtype)] if bias else []
        results += [product_with_wider(e.T, a * column).to(e.dtype)] if a.shape[1] else []
    return results


def gram_moments(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|g|^2, the alignments <g_i - g, g>, |g_i - g|^2 and the Gramian of g_i - g, in float64, from K = G G^T."""
    rows = gram.mean(1, dtype=torch.float64)
    mean = rows.mean()
    alignments = rows - mean
    centred = (gram - rows[:, None]).sub_(alignments)
    return mean.clamp(min=0), alignments, centred.diagonal().clamp(min=0), centred


def sample_weights(
    squared_grad_norm: Tensor, alignments: Tensor, squared_norms: Tensor, epsilon: Tensor, ulp: float
) -> tuple[Tensor, Tensor]:
    """epsilon, or 0 where D = 0 to rounding, and the weights (1 - epsilon a_i) / B of eq. (10)."""
    is_zero = squared_norms.mean() <= 8 * ulp * squared_grad_norm
    epsilon = torch.where(is_zero, 0, epsilon)
    return epsilon, (1 - epsilon * alignments) / alignments.shape[0]


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric positive semi-definite matrix, ascending; NaN where it is not finite."""
    # Eigenvalue routines raise on non-finite input; a GradScaler overflow has to flow through instead.
    finite = matrix.sum(dtype=torch.float64).isfinite()
    found = torch.linalg.eigvalsh(torch.where(finite, matrix, 0.0).double()).clamp(min=0)
    return torch.where(finite, found, torch.nan).to(matrix.dtype)


def rank(eigenvalues: Tensor, size: int, largest: Tensor, ulp: float) -> Tensor:
    """How many eigenvalues of D, of a matrix of `size`, are above its rounding; `largest` is the largest |g_i|^2."""
    return (eigenvalues > ulp * torch.maximum(size * eigenvalues.max(), largest)).sum()


def largest_eigenvalue(matrix: Tensor, ulp: float) -> Tensor:
    """lambda_max of a symmetric positive semi-definite matrix, to full precision whatever `ulp` is."""
    return eigenvalues(matrix)[-1].clone()


def precondition(grads: list[Tensor], epsilon: Tensor) -> list[Tensor]:
    """(I - eps D) g = sum_i w_i g_i with w_i = (1 - eps <g_i - g, g>) / B, eq. (10)."""
    _, alignments, _ = moments(grads)
    return combine(grads, (1 - epsilon * alignments) / alignments.shape[0])


class Geometry(NamedTuple):
    """Of a convolution with zero padding: one number per dimension of space, and the number of groups."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @property
    def is_pointwise(self) -> bool:
        """Whether each place of the output depends on the same place of the input alone."""
        return all(numbers == (1, 1, 0) for numbers in zip(self.kernel, self.stride, self.padding, strict=True))

    def unused(self, places: Sequence[int], space: Sequence[int]) -> list[int]:
        """How many places, by dimension, the convolution of `space` has beyond `places`: some, if it is transposed.

        Raises:
            ValueError: if it has fewer.
        """
        sizes = zip(space, places, *self[:4], strict=True)
        unused = [(size + 2 * p - d * (k - 1) - 1) // s + 1 - number for size, number, k, s, p, d in sizes]
        if min(unused) < 0:
            raise ValueError(
                f"output_grad has {tuple(places)} places: those are more places than a convolution of {tuple(space)}"
                f" with {self} gives"
            )
        return unused


def conv_weight_grads(
    output_grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out: Tensor,
) -> None:
    """Each sample's own weight gradient, into `out`, (B, m, n / groups, *kernel)."""
    out.copy_(conv_weight_grads_as_groups(output_grad, x, Geometry(kernel, stride, padding, dilation, groups)))


def conv_weight_grads_as_groups(output_grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """(B, m, n / groups, *kernel): the weight gradient of a convolution whose groups are the samples."""
    grads, images = (y.reshape(1, -1, *y.shape[2:]) for y in (output_grad, x))
    gradient = conv_weight_grad(grads, images, geometry._replace(groups=geometry.groups * x.shape[0]))
    return gradient.view(*output_grad.shape[:2], *gradient.shape[1:])


def conv_weight_grad(output_grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """(m, n / groups, *kernel): the weight gradient of a convolution."""
    kernel, stride, padding, dilation, groups = geometry
    unused = geometry.unused(output_grad.shape[2:], x.shape[2:])
    if any(unused):
        output_grad = F.pad(output_grad, [y for number in reversed(unused) for y in (0, number)])
    weight, none = x.new_empty(1).expand(output_grad.shape[1], x.shape[1] // groups, *kernel), [0] * len(kernel)
    options = stride, padding, dilation, False, none, groups, (False, True, False)
    return torch.ops.aten.convolution_backward(output_grad, x, weight, None, *options)[1]


# The most bytes of unfolded inputs at a time. Copying so many takes a GPU some 40 us, many times as long as a launch,
# and the product that reads them fills the multiprocessors.
UNFOLDED_BYTES = 64 << 20


def unfolded(x: Tensor, places: Sequence[int], geometry: Geometry) -> Tensor:
    """(B, n * kernel, T): the inputs that an output channel's weights are multiplied by, at each of the T `places`.

    One operator copies a strided view of the padded input. `F.unfold` launches a kernel for every sample on CUDA, and
    takes longer on the CPU.
    """
    geometry.unused(places, x.shape[2:])
    kernel, stride, padding, dilation, _ = geometry
    if any(padding):
        x = F.pad(x, [number for number in reversed(padding) for _ in range(2)])
    per_sample, per_channel, *steps = x.stride()
    to_weight, to_place = ([a * b for a, b in zip(numbers, steps, strict=True)] for numbers in (dilation, stride))
    columns = x.as_strided((*x.shape[:2], *kernel, *places), (per_sample, per_channel, *to_weight, *to_place))
    return columns.reshape(len(x), -1, math.prod(places))


def conv_weight_grads_by_unfolding(output_grad: Tensor, x: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write each sample's weight gradient, a product with unfolded inputs, to `out`: (B, m, n / groups, *kernel)."""
    places, groups = output_grad.shape[2:], geometry.groups
    grads, images = output_grad.flatten(2).unflatten(1, (groups, -1)), x.unflatten(1, (groups, -1))
    weights = out.view(len(x), groups, grads.shape[2], images.shape[2], -1)
    each = groups * weights.shape[4] * math.prod(places) * x.itemsize  # bytes for one sample and channel
    channels = min(images.shape[2], max(1, UNFOLDED_BYTES // each))
    samples = max(1, UNFOLDED_BYTES // (each * channels))
    for e, some, gradients in zip(grads.split(samples), images.split(samples), weights.split(samples), strict=True):
        e = e.flatten(0, 1)
        for image, gradient in zip(some.split(channels, 2), gradients.split(channels, 3), strict=True):
            columns = unfolded(image.flatten(0, 1), places, geometry)
            torch.bmm(e, columns.mT, out=gradient.view(*e.shape[:2], columns.shape[1]))


def block_elements(device: torch.device) -> int:
    """The number of elements of gradients that are formed at a time.

    On the CPU they stay in the caches. On a GPU 64 MiB of float32 take longer to read than a launch takes.
    """
    return 1 << 20 if device.type == "cpu" else 1 << 24


# The fewest output channels of a block. Measured: with 8 channels of 256 it takes three times as long.
_CHANNELS = 32


def conv_blocks(output_grad: Tensor, x: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Per-sample weight gradients, a block of output channels at a time, in the accumulation dtype."""
    dtype = accumulate_dtype(x.dtype)
    output_grad, x = output_grad.to(dtype), x.to(dtype)
    each = x.shape[0] * x.shape[1] * math.prod(geometry.kernel)
    for some in output_grad.split(max(_CHANNELS, block_elements(x.device) // each), 1):
        yield conv_weight_grads_as_groups(some, x, geometry)


def conv_gram(
    output_grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The Gramian of each sample's own weight gradient, (B, B), of which some are formed at a time."""
    geometry = Geometry(kernel, stride, padding, dilation, 1)
    return sum(torch.ops.rgd_ext.gram([block]) for block in conv_blocks(output_grad, x, geometry))


def conv_scalar_moments(
    output_grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`scalar_moments` of each sample's own weight gradient, of which some are formed at a time."""
    geometry = Geometry(kernel, stride, padding, dilation, 1)
    parts = [torch.ops.rgd_ext.scalar_moments([block]) for block in conv_blocks(output_grad, x, geometry)]
    return tuple(map(sum, zip(*parts, strict=True)))


def product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left @ right, of matrices or batches of them, in `dtype`: their own, or float32 for 16-bit operands on CUDA.

    Matrix units multiply 16-bit operands without a conversion. Each product is exact in float32, as which it is summed.
    """
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    return multiply(left, right, out=out) if left.dtype == dtype else multiply(left, right, out_dtype=dtype, out=out)


def product_with_wider(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, of matrices, in the dtype of `right`, which is split in two on a GPU if `left` is narrower.

    A sample's weight is 1 and a small correction, which 16 bits would lose.
    """
    if left.dtype == right.dtype or left.is_cpu:
        return torch.mm(left.to(right.dtype), right)
    high = right.to(left.dtype)
    low = (right - high).to(left.dtype)
    return product(left, high, right.dtype).add_(product(left, low, right.dtype))


def sum_rows(rows: Tensor, indices: Tensor, number: int) -> Tensor:
    """(number, *shape): row r is the sum of the `rows`, (N, *shape), whose index is r.

    The order of summation is always the same, and the host does not wait for the device.
    """
    if rows.is_cpu:
        return rows.new_zeros(number, *rows.shape[1:]).index_add_(0, indices, rows)
    # On CUDA index_add_ uses atomics. This is the kernel that computes SGD's gradient of an embedding.
    flat = rows.reshape(len(rows), rows.shape[1:].numel())
    return torch.ops.aten.embedding_dense_backward(flat, indices, number, -1, False).view(number, *rows.shape[1:])


def embedding_gram(keys: Tensor, sums: Tensor, table_rows: int, batch_size: int) -> Tensor:
    """The Gramian of an embedding's gradients, (B, B), from the sums of the entries of each sample and row.

    Args:
        keys: sample * table_rows + row of each entry, (N,), ascending.
        sums: (N, n): the first entry with a key has the sum over all entries with it, and the others have zeros.
        table_rows: of the table.
        batch_size: B.
    """
    samples, rows = keys // table_rows, keys % table_rows
    gram, number = sums.new_zeros(batch_size, batch_size), max(1, block_elements(keys.device) // max(1, len(keys)))
    for some in torch.arange(len(keys), device=keys.device).split(number):
        products = (sums @ sums[some].T).masked_fill_(rows[:, None] != rows[some], 0)
        gram += sum_rows(sum_rows(products, samples, batch_size).T.contiguous(), samples[some], batch_size)
    return (gram + gram.T) / 2


def group_norm_grads(output_grad: Tensor, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """sum_t e_t x^_t and sum_t e_t per sample and channel, both (B, n), with x^ the normalised input."""
    normalised = F.group_norm(x, groups, eps=eps)
    weight, bias = (y.reshape(*y.shape[:2], -1).sum(2) for y in (normalised * output_grad, output_grad))
    return weight, bias


def layer_norm_grads(output_grad: Tensor, x: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """sum_t e_t o x^_t and sum_t e_t per sample, both (B, n), with x^ = LayerNorm(x), or RMSNorm(x) if not centred."""
    norm, places = F.layer_norm if centred else F.rms_norm, x.shape[1:-1].numel()
    products = norm(x, x.shape[-1:], eps=eps) * output_grad
    return tuple(t.reshape(len(x), places, x.shape[-1]).sum(1) for t in (products, output_grad))


def linear_grads(output_grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sum_t e_t x_t^T and sum_t e_t per sample, (B, m, n) and (B, m)."""
    return output_grad.mT @ x, output_grad.sum(1)


def layer_grads(
    kinds: list[str],
    output_grads: list[Tensor],
    inputs: list[Tensor],
    groups: list[int],
    eps: list[float],
    biases: list[bool],
) -> Tensor:
    """Side by side, (B, D), of each layer the weight's gradients and those of the bias, if it has one."""
    columns = []
    for kind, e, x, number, epsilon, bias in zip(kinds, output_grads, inputs, groups, eps, biases, strict=True):
        if kind == "linear":
            pair = linear_grads(e, x)
        elif kind == "group_norm":
            pair = torch.ops.rgd_ext.group_norm_grads(e, x, number, epsilon)
        elif kind in ("layer_norm", "rms_norm"):
            pair = torch.ops.rgd_ext.layer_norm_grads(e, x, epsilon, kind == "layer_norm")
        else:
            raise ValueError(f"kind is {kind}: choose linear, layer_norm, rms_norm or group_norm")
        columns += [gradient.flatten(1) for gradient in pair[: 1 + bias]]
    return torch.cat(columns, 1)
