"""The operators of RGD on materialised per-sample gradients: schema, fake kernel, default kernel, wrapper.

`grads` is always a (B, d) tensor or a sequence of (B, *shape) tensors, one per parameter, never concatenated.
Supported dtypes: float32, float64, bfloat16 and float16; sums are accumulated in float32 (float64 for float64).
The default kernel is `rgd_ext.reference`; the compiled extension, where it was built, overrides it per device.
None of the operators has a derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import reference
from .reference import accumulate_dtype

Tensors: TypeAlias = Tensor | Sequence[Tensor]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_library = torch.library.Library("rgd_ext", "DEF")

# The devices for which each operator has a compiled kernel. docs/kernels.md says why some have none for CUDA.
KERNELS = {
    **dict.fromkeys(("moments", "scalar_moments", "squared_norm", "combine", "precondition"), ("CPU", "CUDA")),
    **dict.fromkeys(("gram", "ghost_gram", "ghost_combine", "diffusion_mv"), ("CPU", "CUDA")),
    **dict.fromkeys(("gram_moments", "sample_weights", "largest_eigenvalue"), ("CPU", "CUDA")),
    **dict.fromkeys(("group_norm_grads", "layer_norm_grads"), ("CPU", "CUDA")),
    "embedding_gram": ("CUDA",),
    **dict.fromkeys(("layer_grads", "conv_weight_grads", "conv_gram", "conv_scalar_moments"), ("CPU",)),
}


def as_list(tensors: Tensors) -> list[Tensor]:
    """A list of tensors from one tensor or a sequence of them."""
    if isinstance(tensors, Tensor):
        return [tensors]
    try:
        return list(tensors)
    except TypeError as error:
        raise TypeError(f"got {tensors!r}: pass a tensor, or a sequence of tensors") from error


def checked_grads(grads: Tensors) -> list[Tensor]:
    """`grads` as a list, or an error that names what is wrong with it."""
    tensors = as_list(grads)
    if not tensors:
        raise ValueError("grads is empty: pass a (B, d) tensor or at least one (B, *shape) tensor")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"grads[{index}] is a {type(tensor).__name__}: pass tensors of shape (B, *shape)")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"grads[{index}] has dtype {tensor.dtype}: per-sample gradients are float32, float64, bfloat16 or"
                " float16; convert it first"
            )
        if tensor.ndim == 0:
            raise ValueError(f"grads[{index}] is a scalar: its first dimension must be the batch, (B, *shape)")
    first = tensors[0]
    if first.shape[0] == 0:
        raise ValueError(f"empty batch: grads[0] has shape {tuple(first.shape)}; RGD needs at least one sample")
    for index, tensor in enumerate(tensors):
        if tensor.shape[0] != first.shape[0]:
            raise ValueError(
                f"batch sizes disagree: grads[0] has {first.shape[0]} samples and grads[{index}] has"
                f" {tensor.shape[0]}; every tensor must be (B, *shape) with the same B"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"dtypes disagree: grads[0] is {first.dtype} and grads[{index}] is {tensor.dtype}; convert them to one"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"devices disagree: grads[0] is on {first.device} and grads[{index}] on {tensor.device};"
                " move them to one device"
            )
    return tensors


_library.define("moments(Tensor[] grads) -> (Tensor[], Tensor, Tensor)")


@torch.library.register_fake("rgd_ext::moments", lib=_library)
def _(grads):
    statistic = grads[0].new_empty(grads[0].shape[0], dtype=accumulate_dtype(grads[0].dtype))
    return [g.new_empty(g.shape[1:]) for g in grads], statistic, torch.empty_like(statistic)


torch.library.impl(_library, "moments", "CompositeExplicitAutograd")(reference.moments)


def moments(grads: Tensors) -> tuple[list[Tensor], Tensor, Tensor]:
    """Mean, centred alignments and centred squared norms: one read of G.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).

    Returns:
        g = mean_i g_i, a list of (*shape) in the dtype of `grads`; the alignments a_i = <g_i - g, g>, shape (B,),
        which sum to zero; and |g_i - g|^2, shape (B,), whose mean is the trace of D. Both in the accumulation dtype.

    Raises:
        ValueError: for an empty list or batch, a scalar, batch sizes or devices that disagree.
        TypeError: for anything but floating-point tensors of one dtype.
    """
    return torch.ops.rgd_ext.moments(checked_grads(grads))


_library.define("scalar_moments(Tensor[] grads) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("rgd_ext::scalar_moments", lib=_library)
def _(grads):
    statistic = grads[0].new_empty(grads[0].shape[0], dtype=accumulate_dtype(grads[0].dtype))
    return statistic.new_empty(()), statistic, torch.empty_like(statistic)


torch.library.impl(_library, "scalar_moments", "CompositeExplicitAutograd")(reference.scalar_moments)


def scalar_moments(grads: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """|g|^2, and the alignments and squared norms of `moments`, without writing the mean.

    Raises:
        ValueError, TypeError: as `moments`.
    """
    return torch.ops.rgd_ext.scalar_moments(checked_grads(grads))


_library.define("squared_norm(Tensor[] vector) -> Tensor")


@torch.library.register_fake("rgd_ext::squared_norm", lib=_library)
def _(vector):
    return vector[0].new_empty((), dtype=accumulate_dtype(vector[0].dtype))


torch.library.impl(_library, "squared_norm", "CompositeExplicitAutograd")(reference.squared_norm)


_library.define("combine(Tensor[] grads, Tensor weights) -> Tensor[]")


@torch.library.register_fake("rgd_ext::combine", lib=_library)
def _(grads, weights):
    return [g.new_empty(g.shape[1:]) for g in grads]


torch.library.impl(_library, "combine", "CompositeExplicitAutograd")(reference.combine)


def combine(grads: Tensors, weights: Tensor) -> list[Tensor]:
    """Weighted sum over samples, p = sum_i w_i g_i: the second read of G.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).
        weights: shape (B,); (1 - eps a_i) / B gives the RGD direction, eq. (10). Converted to the accumulation dtype.

    Returns:
        A list of (*shape) in the dtype of `grads`.

    Raises:
        ValueError, TypeError: as `moments`; ValueError if `weights` is not of shape (B,) on the device of `grads`.
    """
    tensors = checked_grads(grads)
    batch_size, device = tensors[0].shape[0], tensors[0].device
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is a {type(weights).__name__}: pass a tensor of shape (B,)")
    if weights.shape != (batch_size,):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} but grads holds {batch_size} samples: pass one weight per sample"
        )
    if weights.device != device:
        raise ValueError(f"weights is on {weights.device} but grads on {device}: move them to one device")
    return torch.ops.rgd_ext.combine(tensors, weights.to(accumulate_dtype(tensors[0].dtype)))


_library.define("diffusion_mv(Tensor[] grads, Tensor[] vectors) -> Tensor[]")


@torch.library.register_fake("rgd_ext::diffusion_mv", lib=_library)
def _(grads, vectors):
    return [v.new_empty(v.shape) for v in vectors]


torch.library.impl(_library, "diffusion_mv", "CompositeExplicitAutograd")(reference.diffusion_mv)


def diffusion_mv(grads: Tensors, vectors: Tensors) -> list[Tensor]:
    """Diffusion matrix times one or several vectors, D v = (1/B) sum_i <g_i - g, v> g_i: two reads of G.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).
        vectors: one tensor per tensor of `grads`, of shape (*shape) for one vector or (k, *shape) for k of them.

    Returns:
        A list of tensors of the shapes of `vectors`.

    Raises:
        ValueError, TypeError: as `moments`; ValueError if `vectors` does not match `grads` in number, shape, dtype
            or device.
    """
    tensors, directions = checked_grads(grads), as_list(vectors)
    if len(tensors) != len(directions):
        raise ValueError(f"grads has {len(tensors)} tensors and vectors {len(directions)}: pass one vector per tensor")
    leading = {v.shape[: v.ndim - g.ndim + 1] for g, v in zip(tensors, directions, strict=True)}
    if len(leading) > 1:
        raise ValueError(f"vectors disagree in number: their leading shapes are {sorted(map(tuple, leading))}")
    for index, (grad, vector) in enumerate(zip(tensors, directions, strict=True)):
        shape = tuple(grad.shape[1:])
        if vector.ndim not in (len(shape), len(shape) + 1) or vector.shape[vector.ndim - len(shape) :] != shape:
            raise ValueError(
                f"vectors[{index}] has shape {tuple(vector.shape)}: expected {shape} for one vector or (k, *{shape})"
                " for k of them"
            )
        if (vector.dtype, vector.device) != (grad.dtype, grad.device):
            raise ValueError(
                f"vectors[{index}] is {vector.dtype} on {vector.device} but grads[{index}] is {grad.dtype} on"
                f" {grad.device}: convert one to the other"
            )
    return torch.ops.rgd_ext.diffusion_mv(tensors, directions)


_library.define("gram(Tensor[] grads) -> Tensor")


@torch.library.register_fake("rgd_ext::gram", lib=_library)
def _(grads):
    batch_size = grads[0].shape[0]
    return grads[0].new_empty((batch_size, batch_size), dtype=accumulate_dtype(grads[0].dtype))


torch.library.impl(_library, "gram", "CompositeExplicitAutograd")(reference.gram)


def gram(grads: Tensors) -> Tensor:
    """Gramian K = G G^T of the per-sample gradients, not centred.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).

    Returns:
        K of shape (B, B) in the accumulation dtype. Centred and divided by B it has the non-zero spectrum of D.

    Raises:
        ValueError, TypeError: as `moments`.
    """
    return torch.ops.rgd_ext.gram(checked_grads(grads))


_library.define("ghost_gram(Tensor[] inputs, Tensor[] output_grads, bool[] biases) -> Tensor")


@torch.library.register_fake("rgd_ext::ghost_gram", lib=_library)
def _(inputs, output_grads, biases):
    batch_size = output_grads[0].shape[0]
    return output_grads[0].new_empty((batch_size, batch_size), dtype=accumulate_dtype(output_grads[0].dtype))


torch.library.impl(_library, "ghost_gram", "CompositeExplicitAutograd")(reference.ghost_gram)


def ghost_gram(inputs: Tensors, output_grads: Tensors, biases: Sequence[bool]) -> Tensor:
    """Gramian of linear layers y = W x + b without their gradients, K = sum_l (A_l A_l^T + bias_l) o (E_l E_l^T).

    Sample i's gradient of a weight is the outer product of its rows in E_l and A_l, that of a bias its row in E_l.

    Args:
        inputs: A_l, (B, n_l), the inputs of each layer. With n_l = 0 only the bias counts.
        output_grads: E_l, (B, m_l), the gradients of its outputs.
        biases: whether the layer has a bias.

    Returns:
        K of shape (B, B) in the accumulation dtype, exactly symmetric.

    Raises:
        ValueError, TypeError: as `moments`; ValueError if the three disagree in number or a tensor is not a matrix.
    """
    return torch.ops.rgd_ext.ghost_gram(*_checked_layers(inputs, output_grads, biases), biases)


def _checked_layers(inputs: Tensors, output_grads: Tensors, biases: Sequence[bool]) -> tuple[list[Tensor], ...]:
    tensors = checked_grads(as_list(inputs) + as_list(output_grads))
    number = len(tensors) // 2
    if len(as_list(inputs)) != number or len(biases) != number or len(tensors) % 2:
        raise ValueError(
            f"got {len(as_list(inputs))} inputs, {len(as_list(output_grads))} output gradients and {len(biases)}"
            " biases: pass one of each per layer"
        )
    for tensor in tensors:
        if tensor.ndim != 2:
            raise ValueError(f"a layer has a tensor of shape {tuple(tensor.shape)}: pass matrices (B, n) and (B, m)")
    return tensors[:number], tensors[number:]


_library.define("ghost_combine(Tensor[] inputs, Tensor[] output_grads, bool[] biases, Tensor weights) -> Tensor[]")


@torch.library.register_fake("rgd_ext::ghost_combine", lib=_library)
def _(inputs, output_grads, biases, weights):
    results = []
    for a, e, bias in zip(inputs, output_grads, biases, strict=True):
        results += [e.new_empty(e.shape[1])] * bias + [e.new_empty(e.shape[1], a.shape[1])] * (a.shape[1] > 0)
    return results


torch.library.impl(_library, "ghost_combine", "CompositeExplicitAutograd")(reference.ghost_combine)


def ghost_combine(inputs: Tensors, output_grads: Tensors, biases: Sequence[bool], weights: Tensor) -> list[Tensor]:
    """Weighted sums over samples of the gradients of linear layers y = W x + b, which are never formed.

    Args:
        inputs, output_grads, biases: of each layer, as `ghost_gram` takes them.
        weights: w, shape (B,), on their device.

    Returns:
        For each layer sum_i w_i e_i, (m_l,), where it has a bias, and then sum_i w_i e_i a_i^T, (m_l, n_l), where n_l
        is not 0.

    Raises:
        ValueError, TypeError: as `ghost_gram`; ValueError if `weights` is not of shape (B,), holds no floats or is on
            another device.
    """
    layers = _checked_layers(inputs, output_grads, biases)
    grad = layers[1][0]
    if weights.shape != grad.shape[:1] or not weights.is_floating_point() or weights.device != grad.device:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} and is {weights.dtype} on {weights.device}: pass"
            f" {grad.shape[0]} floating-point weights on {grad.device}"
        )
    return torch.ops.rgd_ext.ghost_combine(*layers, biases, weights)


_library.define("gram_moments(Tensor gram) -> (Tensor, Tensor, Tensor, Tensor)")


@torch.library.register_fake("rgd_ext::gram_moments", lib=_library)
def _(gram):
    alignments = gram.new_empty(gram.shape[0], dtype=torch.float64)
    squared, centred = alignments.new_empty(()), alignments.new_empty(gram.shape)
    return squared, alignments, torch.empty_like(alignments), centred


torch.library.impl(_library, "gram_moments", "CompositeExplicitAutograd")(reference.gram_moments)


def gram_moments(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of per-sample gradients from their Gramian, as `moments` has them from G; computed in float64.

    Args:
        gram: K = G G^T, shape (B, B), float64 or float32.

    Returns:
        In float64: |g|^2, a scalar; the alignments a_i = <g_i - g, g>, shape (B,); |g_i - g|^2, shape (B,); and the
        centred Gramian <g_i - g, g_j - g>, shape (B, B).

    Raises:
        ValueError, TypeError: as `largest_eigenvalue`.
    """
    return torch.ops.rgd_ext.gram_moments(_checked_gramian(gram, "gram"))


_library.define(
    "sample_weights(Tensor squared_grad_norm, Tensor alignments, Tensor squared_norms, Tensor epsilon, float ulp)"
    " -> (Tensor, Tensor)"
)


@torch.library.register_fake("rgd_ext::sample_weights", lib=_library)
def _(squared_grad_norm, alignments, squared_norms, epsilon, ulp):
    return torch.empty_like(epsilon), torch.empty_like(alignments)


torch.library.impl(_library, "sample_weights", "CompositeExplicitAutograd")(reference.sample_weights)


def sample_weights(
    squared_grad_norm: Tensor, alignments: Tensor, squared_norms: Tensor, epsilon: Tensor, ulp: float
) -> tuple[Tensor, Tensor]:
    """The weights on the samples that make their weighted sum the RGD direction, eq. (10).

    Args:
        squared_grad_norm: |g|^2, a scalar; this and the next two are what `moments` and `gram_moments` give.
        alignments: a_i = <g_i - g, g>, shape (B,).
        squared_norms: |g_i - g|^2, shape (B,), with mean tr D.
        epsilon: a scalar.
        ulp: relative rounding error of the statistics.

    Returns:
        epsilon, or 0 where D = 0 to rounding (tr D at most 8 ulps of |g|^2, which is every |g_i|^2 then); and with it
        w_i = (1 - epsilon a_i) / B, shape (B,).

    Raises:
        ValueError: if shapes, dtypes or devices disagree.
        TypeError: for anything but float64 or float32.
    """
    if alignments.ndim != 1 or squared_norms.shape != alignments.shape or not alignments.numel():
        raise ValueError(
            f"alignments and squared_norms have shapes {tuple(alignments.shape)} and {tuple(squared_norms.shape)}: pass"
            " one of each per sample, (B,)"
        )
    for name, tensor in (("squared_grad_norm", squared_grad_norm), ("epsilon", epsilon)):
        if tensor.ndim:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: pass a scalar tensor")
    tensors = (alignments, squared_norms, squared_grad_norm, epsilon)
    if alignments.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"alignments has dtype {alignments.dtype}: convert it to float64 or float32")
    if len({(t.dtype, t.device) for t in tensors}) > 1:
        raise ValueError(
            f"the statistics and epsilon are {[f'{t.dtype} on {t.device}' for t in tensors]}: convert them to one dtype"
            " on one device"
        )
    return torch.ops.rgd_ext.sample_weights(squared_grad_norm, alignments, squared_norms, epsilon, ulp)


_library.define("largest_eigenvalue(Tensor matrix, float ulp) -> Tensor")


@torch.library.register_fake("rgd_ext::largest_eigenvalue", lib=_library)
def _(matrix, ulp):
    return matrix.new_empty(())


torch.library.impl(_library, "largest_eigenvalue", "CompositeExplicitAutograd")(reference.largest_eigenvalue)


def largest_eigenvalue(matrix: Tensor, ulp: float | None = None) -> Tensor:
    """lambda_max of a symmetric positive semi-definite matrix, such as a Gramian, as precisely as its entries allow.

    Args:
        matrix: shape (B, B), float64 or float32.
        ulp: relative rounding error of its entries, by default that of its dtype; larger for a float64 matrix made from
            float32. On a GPU sums are in float32 if `ulp` is at least that of float32.

    Returns:
        A scalar of the dtype of `matrix`, at least 0; NaN where `matrix` is not finite. The search stops at a residual
        |A v - theta v| of ulp / 4 (1e-13 at least) times theta. That bounds the distance to an eigenvalue; if one lies
        just above a cluster of others, theta may be one of these, and errors of 100 ulps were seen.

    Raises:
        ValueError: if `matrix` is empty or not square, or for an ulp that is negative or not below 1.
        TypeError: for another dtype.
    """
    matrix = _checked_gramian(matrix, "matrix")
    ulp = torch.finfo(matrix.dtype).eps if ulp is None else ulp
    if not 0 <= ulp < 1:
        raise ValueError(f"ulp is {ulp}: pass a relative rounding error, at least 0 and below 1, or None")
    return torch.ops.rgd_ext.largest_eigenvalue(matrix, ulp)


def _checked_gramian(matrix: Tensor, name: str) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}: pass a symmetric (B, B) matrix")
    if matrix.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"{name} has dtype {matrix.dtype}: convert it to float64 or float32")
    return matrix


_library.define("precondition(Tensor[] grads, Tensor epsilon) -> Tensor[]")


@torch.library.register_fake("rgd_ext::precondition", lib=_library)
def _(grads, epsilon):
    return [g.new_empty(g.shape[1:]) for g in grads]


torch.library.impl(_library, "precondition", "CompositeExplicitAutograd")(reference.precondition)


def precondition(grads: Tensors, epsilon: float | Tensor) -> list[Tensor]:
    """RGD direction for a known epsilon, (I - eps D) g, eq. (10), in two reads of G.

    Args:
        grads: per-sample gradients, each of shape (B, *shape).
        epsilon: a number, or a one-element tensor on the device of `grads` (no synchronisation). The caller answers
            for eps < 1 / lambda_max(D), eq. (6); `rgd_ext.direction` chooses it.

    Returns:
        A list of (*shape) in the dtype of `grads`.

    Raises:
        ValueError, TypeError: as `moments`; ValueError for a number that is not finite or a tensor that is not a
            scalar on the device of `grads`.
    """
    tensors = checked_grads(grads)
    first = tensors[0]
    dtype = accumulate_dtype(first.dtype)
    if not isinstance(epsilon, Tensor):
        if not math.isfinite(epsilon):
            raise ValueError(f"epsilon is {epsilon}: pass a finite number")
        epsilon = torch.full((), epsilon, dtype=dtype, device=first.device)
    if epsilon.numel() != 1 or epsilon.device != first.device:
        raise ValueError(
            f"epsilon has shape {tuple(epsilon.shape)} on {epsilon.device}: pass a number or a scalar on {first.device}"
        )
    return torch.ops.rgd_ext.precondition(tensors, epsilon.reshape(()).to(dtype))


_library.define(
    "conv_weight_grads(Tensor output_grad, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation,"
    " int groups, Tensor(a!) out) -> ()"
)


@torch.library.register_fake("rgd_ext::conv_weight_grads", lib=_library)
def _(output_grad, x, kernel, stride, padding, dilation, groups, out):
    return None


torch.library.impl(_library, "conv_weight_grads", "CompositeExplicitAutograd")(reference.conv_weight_grads)


def conv_weight_grads(
    output_grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Per-sample gradients of a convolution's weight: for each sample, what backward would sum over all of them.

    For one dimension and group: h_i[o, c, k] = sum_t output_grad[i, o, t] x[i, c, stride t + dilation k - padding].

    Args:
        output_grad: shape (B, m, *output), with one, two or three dimensions of space.
        x: shape (B, n, *space), of the same dtype and device.
        kernel, stride, padding, dilation: one number per dimension of space; padding is with zeros, on both sides.
        groups: divides m and n.

    Returns:
        (B, m, n / groups, *kernel), contiguous. For a transposed convolution, `output_grad` and `x` change places.

    Raises:
        ValueError, TypeError: as `moments`; ValueError if the shapes are not those of a convolution.
    """
    checked_grads([output_grad, x])
    space = x.ndim - 2
    geometry = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    if not 1 <= space <= 3 or output_grad.ndim != x.ndim:
        raise ValueError(
            f"output_grad has shape {tuple(output_grad.shape)} and x {tuple(x.shape)}: pass (B, m, *output) and"
            " (B, n, *space) with one to three dimensions of space"
        )
    for name, numbers in geometry.items():
        least = 0 if name == "padding" else 1
        if len(numbers) != space or any(number < least for number in numbers):
            raise ValueError(f"{name} is {tuple(numbers)}: pass one number for each of {space} dimensions of space")
    if groups < 1 or output_grad.shape[1] % groups or x.shape[1] % groups:
        raise ValueError(f"groups is {groups}: it must divide {output_grad.shape[1]} and {x.shape[1]} channels")
    for size, places, k, s, p, d in zip(x.shape[2:], output_grad.shape[2:], *geometry.values(), strict=True):
        if places < 1 or (places - 1) * s + (k - 1) * d >= size + 2 * p:
            raise ValueError(
                f"output_grad has {places} places along a dimension of {size} with kernel {k}, stride {s}, padding {p}"
                f" and dilation {d}: pass at least 1 and at most {(size + 2 * p - (k - 1) * d - 1) // s + 1}"
            )
    out = x.new_empty(*output_grad.shape[:2], x.shape[1] // groups, *kernel)
    torch.ops.rgd_ext.conv_weight_grads(output_grad, x, kernel, stride, padding, dilation, groups, out)
    return out


_CONVOLUTION = "Tensor output_grad, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation"
_library.define(f"conv_gram({_CONVOLUTION}) -> Tensor")
_library.define(f"conv_scalar_moments({_CONVOLUTION}) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("rgd_ext::conv_gram", lib=_library)
def _(output_grad, x, kernel, stride, padding, dilation):
    return x.new_empty((x.shape[0], x.shape[0]), dtype=accumulate_dtype(x.dtype))


@torch.library.register_fake("rgd_ext::conv_scalar_moments", lib=_library)
def _(output_grad, x, kernel, stride, padding, dilation):
    statistic = x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype))
    return statistic.new_empty(()), statistic, torch.empty_like(statistic)


torch.library.impl(_library, "conv_gram", "CompositeExplicitAutograd")(reference.conv_gram)
torch.library.impl(_library, "conv_scalar_moments", "CompositeExplicitAutograd")(reference.conv_scalar_moments)


_library.define("embedding_gram(Tensor keys, Tensor sums, int table_rows, int batch_size) -> Tensor")


@torch.library.register_fake("rgd_ext::embedding_gram", lib=_library)
def _(keys, sums, table_rows, batch_size):
    return sums.new_empty(batch_size, batch_size)


torch.library.impl(_library, "embedding_gram", "CompositeExplicitAutograd")(reference.embedding_gram)


_library.define("group_norm_grads(Tensor output_grad, Tensor x, int groups, float eps) -> (Tensor, Tensor)")


@torch.library.register_fake("rgd_ext::group_norm_grads", lib=_library)
def _(output_grad, x, groups, eps):
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


torch.library.impl(_library, "group_norm_grads", "CompositeExplicitAutograd")(reference.group_norm_grads)


def group_norm_grads(output_grad: Tensor, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Per-sample gradients of the weight and bias of a group normalisation, in one read of its input.

    With x^ the normalised input: sum_t output_grad[i, c, t] x^[i, c, t] and sum_t output_grad[i, c, t].

    Args:
        output_grad, x: shape (B, n, *space), of one dtype and device.
        groups: divides n; each has one mean and variance per sample.
        eps: added to the variance.

    Returns:
        Two tensors of shape (B, n).

    Raises:
        ValueError, TypeError: as `moments`; ValueError if the shapes disagree or `groups` does not divide n.
    """
    checked_grads([output_grad, x])
    if x.ndim < 2 or output_grad.shape != x.shape:
        raise ValueError(
            f"output_grad has shape {tuple(output_grad.shape)} and x {tuple(x.shape)}: pass two of shape (B, n, *space)"
        )
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups is {groups}: it must divide {x.shape[1]} channels")
    return torch.ops.rgd_ext.group_norm_grads(output_grad, x, groups, eps)


_library.define("layer_norm_grads(Tensor output_grad, Tensor x, float eps, bool centred) -> (Tensor, Tensor)")


@torch.library.register_fake("rgd_ext::layer_norm_grads", lib=_library)
def _(output_grad, x, eps, centred):
    shape = x.shape[0], x.shape[-1]
    return x.new_empty(shape), x.new_empty(shape)


torch.library.impl(_library, "layer_norm_grads", "CompositeExplicitAutograd")(reference.layer_norm_grads)


def layer_norm_grads(output_grad: Tensor, x: Tensor, eps: float, centred: bool = True) -> tuple[Tensor, Tensor]:
    """Per-sample gradients of the weight and bias of a LayerNorm or RMSNorm, in one read of its input.

    sum_t output_grad[i, t] o x^[i, t] and sum_t output_grad[i, t], with x^ the normalised input: for each (i, t),
    x^ = (x - mean) / sqrt(variance + eps), or x^ = x / sqrt(mean(x^2) + eps) if not centred.

    Args:
        output_grad, x: shape (B, ..., n), of one dtype and device.
        eps: added to the variance.
        centred: True for LayerNorm, False for RMSNorm.

    Returns:
        Two tensors of shape (B, n).

    Raises:
        ValueError, TypeError: as `moments`; ValueError if the shapes disagree.
    """
    checked_grads([output_grad, x])
    if x.ndim < 2 or output_grad.shape != x.shape:
        raise ValueError(
            f"output_grad has shape {tuple(output_grad.shape)} and x {tuple(x.shape)}: pass two of shape (B, ..., n)"
        )
    return torch.ops.rgd_ext.layer_norm_grads(output_grad, x, eps, centred)


_library.define(
    "layer_grads(str[] kinds, Tensor[] output_grads, Tensor[] inputs, int[] groups, float[] eps, bool[] biases)"
    " -> Tensor"
)


@torch.library.register_fake("rgd_ext::layer_grads", lib=_library)
def _(kinds, output_grads, inputs, groups, eps, biases):
    columns = 0
    for kind, e, x, bias in zip(kinds, output_grads, inputs, biases, strict=True):
        outputs = e.shape[1 if kind == "group_norm" else -1]
        columns += outputs * ((x.shape[-1] if kind == "linear" else 1) + bias)
    return inputs[0].new_empty(inputs[0].shape[0], columns)


torch.library.impl(_library, "layer_grads", "CompositeExplicitAutograd")(reference.layer_grads)
