"""Arguments for the operators in many shapes, dtypes and memory layouts, and what their tests have in common."""

import zlib

import pytest
import torch

from rgd_ext import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


SHAPES = {
    "flat": [(5, 33)],
    "one sample": [(1, 17)],
    "one weight": [(4, 1)],
    "scalars": [(4,), (4, 3)],
    "many": [(7, 3, 5), (7, 64), (7, 1), (7, 2, 3, 4), (7, 129)],
    "empty parameter": [(3, 0), (3, 8)],
    "no weights": [(3, 0)],
    "wide": [(3, 20_011)],
    "wide, many samples": [(130, 4_099)],
    "hundred tensors": [(4, n) for n in range(1, 101)],
}


def sample_grads(name, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return [torch.randn(s, generator=generator).add_(0.2).to(device, dtype) for s in SHAPES[name]]


def laid_out(grads, layout):
    """The same values in another memory layout."""
    if layout == "contiguous":
        return grads
    if layout == "row slices":  # a few columns of a wider matrix; unaligned pointers
        return [torch.cat([g.new_ones(len(g), 3), g.reshape(len(g), -1)], 1)[:, 3:].view_as(g) for g in grads]
    if layout == "aligned row slices":  # rows start on 16 bytes and may end inside them
        flat = [g.reshape(len(g), -1) for g in grads]
        wide = [torch.nn.functional.pad(f, (0, 16 - f.shape[1] % 16)) for f in flat]
        return [w[:, : f.shape[1]].view_as(g) for w, f, g in zip(wide, flat, grads, strict=True)]
    if layout == "every other row":
        return [g.repeat_interleave(2, 0)[::2] for g in grads]
    if layout == "permuted":
        return [g.movedim(0, -1).contiguous().movedim(-1, 0) for g in grads]
    return [g[:1].expand_as(g) for g in grads]


LAYOUTS = ["contiguous", "row slices", "aligned row slices", "every other row", "permuted", "expanded"]


def weights_for(grads):
    return torch.linspace(-0.5, 1.5, len(grads[0])).to(grads[0].device)  # the same bits on every device


def vectors_for(grads, number=None):
    shapes = [g.shape[1:] if number is None else (number, *g.shape[1:]) for g in grads]
    ramps = [torch.linspace(-1, 1, torch.Size(s).numel()).reshape(s) for s in shapes]
    return [r.to(g.device, g.dtype) for r, g in zip(ramps, grads, strict=True)]


CALLS = {
    "moments": lambda g: ops.moments(g),
    "scalar_moments": lambda g: ops.scalar_moments(g),
    "combine": lambda g: ops.combine(g, weights_for(g)),
    "diffusion_mv": lambda g: ops.diffusion_mv(g, vectors_for(g)),
    "diffusion_mv of three": lambda g: ops.diffusion_mv(g, vectors_for(g, 3)),
    "gram": lambda g: ops.gram(g),
    "precondition": lambda g: ops.precondition(g, 0.1),
    "precondition by tensor": lambda g: ops.precondition(g, torch.full((), 0.1, dtype=torch.float64).to(g[0].device)),
}


# B, then n and m of each layer.
LAYERS = {
    "one sample": (1, [(3, 4)]),
    "few": (7, [(33, 5), (1, 1), (0, 17), (5, 0)]),
    "several blocks": (53, [(129, 31), (16, 10)]),
    "wide": (26, [(2_100, 3), (4, 1_025)]),
}


def sample_layers(name, dtype, device="cpu"):
    batch_size, widths = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    sides = [[torch.randn(batch_size, pair[side], generator=generator) for pair in widths] for side in (0, 1)]
    inputs, output_grads = ([x.to(device, dtype) for x in side] for side in sides)
    return inputs, output_grads, [layer % 3 != 1 for layer in range(len(widths))]


# B, n, m, space, kernel, stride, padding, dilation, groups.
CONVOLUTIONS = {
    "1-d": (3, 5, 7, (11,), (3,), (2,), (1,), (1,), 1),
    "1-d, many places": (2, 3, 70, (200,), (5,), (1,), (2,), (2,), 1),
    "2-d": (3, 5, 17, (7, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2-d, 1 x 1": (4, 33, 20, (5, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "2-d, uneven": (2, 4, 6, (8, 7), (3, 2), (2, 3), (1, 2), (2, 1), 1),
    "2-d, several panels": (2, 8, 130, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2-d, groups": (3, 6, 9, (6, 7), (3, 3), (1, 2), (1, 0), (1, 1), 3),
    "2-d, depthwise": (2, 4, 4, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "2-d, one sample": (1, 3, 48, (5, 5), (2, 2), (1, 1), (0, 0), (1, 1), 1),
    "2-d, one place": (2, 3, 4, (3, 2), (3, 2), (1, 1), (0, 0), (1, 1), 1),
    "2-d, many samples": (150, 7, 70, (4, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3-d": (2, 3, 5, (4, 5, 3), (2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 2), 1),
}


def sample_convolution(name, dtype, device="cpu", layout="contiguous", fewer_places=0):
    """The arguments of conv_weight_grads, without the last places along the first dimension."""
    batch_size, n, m, space, *geometry, groups = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    sizes = zip(space, *geometry, strict=True)
    output = [(x + 2 * p - d * (k - 1) - 1) // s + 1 for x, k, s, p, d in sizes]
    output[0] -= fewer_places
    shapes = (batch_size, m, *output), (batch_size, n, *space)
    pair = laid_out([torch.randn(s, generator=generator).to(device, dtype) for s in shapes], layout)
    return *pair, *geometry, groups


def weight_grads_by_autograd(output_grad, x, kernel, stride, padding, dilation, groups):
    """Sample by sample in float64, on the CPU."""
    function = [torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d][len(kernel) - 1]
    rows = []
    for e, a in zip(output_grad.double().cpu(), x.double().cpu(), strict=True):
        weight = torch.zeros(len(e), len(a) // groups, *kernel, dtype=torch.float64, requires_grad=True)
        output = function(a[None], weight, None, stride, padding, dilation, groups)[0]
        rows.append(torch.autograd.grad(output[tuple(slice(size) for size in e.shape)], weight, e)[0])
    return torch.stack(rows)


NORM_SHAPES = {"space": (3, 6, 5, 7), "long": (2, 4, 1_003), "vectors": (3, 6), "one sample": (1, 8, 33)}


def sample_norm(name, dtype, device="cpu", layout="contiguous", offset=0.3):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    pair = [torch.randn(NORM_SHAPES[name], generator=generator).add_(shift) for shift in (0, offset)]
    return *laid_out([x.to(device, dtype) for x in pair], layout), 2, 1e-5


# B, ..., n.
SEQUENCES = {"short": (3, 7, 33), "long": (2, 1_003, 17), "one sample": (1, 130, 16), "one place": (5, 1, 100)}


SEQUENCES |= {"no places": (2, 0, 5), "no numbers": (2, 3, 0), "vectors": (4, 9), "images": (2, 3, 5, 8)}


LAYER_NORMS = [f"{norm}, {name}" for norm in ("LayerNorm", "RMSNorm") for name in SEQUENCES]


def sample_layer_norm(name, dtype, device="cpu", layout="contiguous", offset=0.3):
    norm, shape = name.split(", ")
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    pair = [torch.randn(SEQUENCES[shape], generator=generator).add_(shift) for shift in (0, offset)]
    return *laid_out([x.to(device, dtype) for x in pair], layout), 1e-5, norm == "LayerNorm"


def affine_grads_by_autograd(normalised, output_grad, shape):
    """From a weight and a bias per sample, of that shape."""
    weight, bias = (torch.ones(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grads = torch.autograd.grad(normalised * weight + bias, (weight, bias), output_grad)
    return [grad.reshape(len(normalised), -1) for grad in grads]


def group_norm_grads_by_autograd(output_grad, x, groups, eps):
    """In float64 on the CPU."""
    x, output_grad = x.double().cpu(), output_grad.double().cpu()
    grouped = x.reshape(len(x), groups, -1)
    normalised = (grouped - grouped.mean(2, True)) / (grouped.var(2, correction=0, keepdim=True) + eps).sqrt()
    return affine_grads_by_autograd(normalised.view_as(x), output_grad, (*x.shape[:2], *[1] * (x.ndim - 2)))


def layer_norm_grads_by_autograd(output_grad, x, eps, centred):
    """In float64 on the CPU."""
    x, output_grad = (t.double().cpu().reshape(len(x), x.shape[1:-1].numel(), x.shape[-1]) for t in (x, output_grad))
    centred = x - x.mean(2, True) if centred else x
    normalised = centred / (centred.square().mean(2, True) + eps).sqrt()
    return affine_grads_by_autograd(normalised, output_grad, (len(x), 1, x.shape[2]))


THREADED_LAYOUTS = [("contiguous",), ("permuted",), ("row slices",), ("contiguous",)]


def on_threads(numbers, call, arguments=None):
    """The tensors that `call` gives on each number of threads, with the arguments for it."""
    before = torch.get_num_threads()
    try:
        for threads, some in zip(numbers, arguments or [()] * len(numbers), strict=True):
            torch.set_num_threads(threads)
            yield leaves(call(*some))
    finally:
        torch.set_num_threads(before)


def assert_same_bits(results):
    first, *others = results
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def leaves(result):
    return torch.utils._pytree.tree_leaves(result)


def opcheck(name, arguments):
    """PyTorch's checks of an operator that has no derivative."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.rgd_ext, name).default, arguments, test_utils=tests)
