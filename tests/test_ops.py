"""Every operator against the reference in float64, on every device there is."""

import zlib
from functools import partial

import pytest
import torch
from oracle import TOLERANCE, assert_close, diffusion_matrix, flat, relative_error

import rgd_ext
from rgd_ext import ops, reference
from rgd_ext.metric import rounding

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


def expected(name, grads):
    grads = [g.double().cpu() for g in grads]
    if name == "scalar_moments":
        mean, *scalars = reference.moments(grads)
        return sum(g.square().sum() for g in mean), *scalars
    function = getattr(reference, name.split()[0])
    extra = {
        "moments": [],
        "gram": [],
        "combine": [weights_for(grads).double()],
        "diffusion_mv": [vectors_for(grads, 3 if "three" in name else None)],
        "precondition": [torch.tensor(0.1, dtype=torch.float64)],
    }
    return function(grads, *extra[name.split()[0]])


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_ghost_gram_is_the_gramian_of_explicit_gradients(name, dtype, device):
    inputs, output_grads, biases = sample_layers(name, dtype, device)
    gram = ops.ghost_gram(inputs, output_grads, biases)
    assert gram.dtype == reference.accumulate_dtype(dtype)
    assert torch.equal(gram, gram.T)
    grads = [torch.einsum("bm,bn->bmn", e.double(), a.double()) for a, e in zip(inputs, output_grads, strict=True)]
    grads += [e.double() for e, bias in zip(output_grads, biases, strict=True) if bias]
    assert_close(gram, ops.gram(grads))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_ghost_combine_is_the_combination_of_explicit_gradients(name, dtype, device):
    inputs, output_grads, biases = sample_layers(name, dtype, device)
    weights = torch.randn(len(inputs[0]), generator=torch.Generator().manual_seed(1)).to(device)
    found = iter(ops.ghost_combine(inputs, output_grads, biases, weights))
    for a, e, bias in zip(inputs, output_grads, biases, strict=True):
        weighted = weights.double()[:, None] * e.double()
        for wanted in [weighted.sum(0)] * bias + [torch.einsum("bm,bn->mn", weighted, a.double())] * (a.numel() > 0):
            result = next(found)
            assert result.dtype == dtype
            assert result.shape == wanted.shape
            assert_close(result, wanted, dtype)
    assert next(found, None) is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ghost_combine_keeps_what_is_small_in_the_weights(dtype, device):
    # Of opposite gradients nothing else is left.
    a, e, correction = torch.randn(6, 5), torch.randn(6, 4), 1e-3 * torch.rand(6)
    a, e = (torch.cat([a, a]).to(device, dtype), torch.cat([e, -e]).to(device, dtype))
    weights = torch.cat([1 + correction, 1 - correction]).to(device)
    weighted = weights.double()[:, None] * e.double()
    for operator in (ops.ghost_combine, reference.ghost_combine):
        for result, wanted in zip(
            operator([a], [e], [True], weights), (weighted.sum(0), weighted.T @ a.double()), strict=True
        ):
            assert result.dtype == dtype
            assert_close(result, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_ghost_gram_gives_the_same_bits_for_any_threads_and_layout(name, dtype):
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's own products depend on the number of threads")
    inputs, output_grads, biases = sample_layers(name, dtype)

    def call(layout):
        return ops.ghost_gram(laid_out(inputs, layout), laid_out(output_grads, layout), biases)

    assert_same_bits(on_threads((1, 2, 3, 5), call, THREADED_LAYOUTS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["flat", "one sample", "wide, many samples"])
def test_gram_moments_are_the_moments_of_the_gradients(name, dtype, device):
    grads = sample_grads(name, dtype, device)
    squared, alignments, squared_norms, centred = ops.gram_moments(ops.gram(grads))
    assert {t.dtype for t in (squared, alignments, squared_norms, centred)} == {torch.float64}
    wide = torch.cat([g.double().flatten(1) for g in grads], 1)
    mean = wide.mean(0)
    for found, want in (
        (squared, mean.square().sum()),
        (alignments, (wide - mean) @ mean),
        (squared_norms, (wide - mean).square().sum(1)),
        (centred, (wide - mean) @ (wide - mean).T),
    ):
        # What is left after centring is as exact as the Gramian it came from.
        scale = wide.square().sum(1).max().item()
        torch.testing.assert_close(found, want, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("device", DEVICES)
def test_gram_moments_of_rounding_errors_are_not_negative_and_nan_stays(device):
    ones = torch.ones(3, 3, device=device)
    squared, _, squared_norms, _ = ops.gram_moments(-1e-7 * torch.eye(3, device=device))
    assert squared == 0
    assert torch.equal(squared_norms, torch.zeros_like(squared_norms))
    assert all(part.isnan().all() for part in ops.gram_moments(torch.nan * ones))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sample_weights_are_those_of_eq_10_or_equal(dtype, device):
    scalar = partial(torch.tensor, dtype=dtype, device=device)
    alignments, ulp = scalar([0.5, -2.0, 1.5]), torch.finfo(dtype).eps
    epsilon, weights = ops.sample_weights(scalar(4.0), alignments, scalar([1.0, 2.0, 3.0]), scalar(0.25), ulp)
    assert epsilon == 0.25
    torch.testing.assert_close(weights, (1 - 0.25 * alignments) / 3)
    for chosen in (0.25, float("inf"), float("nan")):
        norms = scalar([0.0, 30 * ulp, 60 * ulp])  # tr D is 30 ulps, |g|^2 is 4
        epsilon, weights = ops.sample_weights(scalar(4.0), alignments, norms, scalar(chosen), ulp)
        assert epsilon == 0
        assert torch.equal(weights, torch.full_like(weights, 1) / 3)
    assert ops.sample_weights(scalar(3.0), alignments, norms, scalar(0.25), ulp)[0] == 0.25


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_weight_grads_are_those_of_each_sample_alone(name, dtype, device):
    arguments = sample_convolution(name, dtype, device)
    result = ops.conv_weight_grads(*arguments)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert_close(result.cpu(), weight_grads_by_autograd(*arguments), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["1-d", "2-d", "3-d"])
def test_conv_weight_grads_of_any_layout(name, layout, device):
    arguments = sample_convolution(name, torch.float32, device, layout)
    assert_close(ops.conv_weight_grads(*arguments).cpu(), weight_grads_by_autograd(*arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["1-d", "2-d, uneven", "2-d, groups", "3-d"])
def test_conv_weight_grads_of_output_that_leaves_input_unused(name, device):
    # As transposed convolutions with output padding have it.
    arguments = sample_convolution(name, torch.float64, device, fewer_places=1)
    assert_close(ops.conv_weight_grads(*arguments).cpu(), weight_grads_by_autograd(*arguments))


# Of convolutions without groups.
WHOLE = [name for name, convolution in CONVOLUTIONS.items() if convolution[-1] == 1]


def conv_statistics(*arguments):
    """Gramian, |g|^2, alignments and squared norms, from one sample's own weight gradient after the other."""
    return [torch.ops.rgd_ext.conv_gram(*arguments), *torch.ops.rgd_ext.conv_scalar_moments(*arguments)]


def conv_statistics_by_autograd(*arguments):
    grads = weight_grads_by_autograd(*arguments, 1).flatten(1)
    mean = grads.mean(0)
    return [grads @ grads.T, mean.square().sum(), (grads - mean) @ mean, (grads - mean).square().sum(1)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_conv_statistics(name, dtype, device):
    *arguments, _ = sample_convolution(name, dtype, device)
    results = conv_statistics(*arguments)
    assert {result.dtype for result in results} == {reference.accumulate_dtype(dtype)}
    assert torch.equal(results[0], results[0].T)
    largest = results[0].diagonal().max().item()
    for result, wanted in zip(results, conv_statistics_by_autograd(*arguments), strict=True):
        assert result.shape == wanted.shape
        difference = (result.double().cpu() - wanted).abs().max().item()  # a single sample has no alignment
        assert difference < TOLERANCE[reference.accumulate_dtype(dtype)] * largest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["1-d", "2-d, uneven", "3-d"])
def test_conv_statistics_of_any_layout(name, layout, device):
    *arguments, _ = sample_convolution(name, torch.float64, device, layout, fewer_places=1)
    for result, wanted in zip(conv_statistics(*arguments), conv_statistics_by_autograd(*arguments), strict=True):
        torch.testing.assert_close(result.cpu(), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["2-d, many samples", "2-d, several panels", "3-d"])
def test_conv_statistics_are_the_same_bits_for_any_threads(name):
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's own sums depend on the number of threads")
    *arguments, _ = sample_convolution(name, torch.float32)
    assert_same_bits(on_threads((1, 2, 5), lambda: conv_statistics(*arguments)))


def test_reference_of_conv_statistics_in_blocks(monkeypatch):
    monkeypatch.setattr(reference, "block_elements", lambda device: 1)
    *arguments, _ = sample_convolution("2-d, several panels", torch.float64)
    results = [reference.conv_gram(*arguments), *reference.conv_scalar_moments(*arguments)]
    for result, wanted in zip(results, conv_statistics_by_autograd(*arguments), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", ["conv_gram", "conv_scalar_moments"])
def test_conv_statistics_pass_opcheck(operator, device):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for dtype in (torch.float32, torch.bfloat16):
        *arguments, _ = sample_convolution("2-d", dtype, device)
        torch.library.opcheck(getattr(torch.ops.rgd_ext, operator).default, arguments, test_utils=tests)


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


NORM_SHAPES = {"space": (3, 6, 5, 7), "long": (2, 4, 1_003), "vectors": (3, 6), "one sample": (1, 8, 33)}


def sample_norm(name, dtype, device="cpu", layout="contiguous", offset=0.3):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    pair = [torch.randn(NORM_SHAPES[name], generator=generator).add_(shift) for shift in (0, offset)]
    return *laid_out([x.to(device, dtype) for x in pair], layout), 2, 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORM_SHAPES)
def test_group_norm_grads_are_those_of_each_sample_alone(name, dtype, device):
    arguments = sample_norm(name, dtype, device)
    for result, wanted in zip(ops.group_norm_grads(*arguments), group_norm_grads_by_autograd(*arguments), strict=True):
        assert result.dtype == dtype
        assert_close(result.cpu(), wanted, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_grads_of_any_layout(layout, device):
    arguments = sample_norm("space", torch.float32, device, layout)
    for result, wanted in zip(ops.group_norm_grads(*arguments), group_norm_grads_by_autograd(*arguments), strict=True):
        assert_close(result.cpu(), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NORM_SHAPES)
def test_group_norm_grads_of_a_large_mean_keep_their_digits(name, device):
    arguments = sample_norm(name, torch.float32, device, offset=300.0)
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's normalised input has fewer digits")
    assert_close(ops.group_norm_grads(*arguments)[0].cpu(), group_norm_grads_by_autograd(*arguments)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_group_norm_grads_of_a_constant_group_are_finite(device):
    ones = torch.ones(2, 4, 3, device=device)
    weight, bias = (t.cpu() for t in ops.group_norm_grads(ones, 7.7 * ones, 2, 1e-5))
    assert torch.allclose(weight, torch.zeros(2, 4), atol=1e-3)
    assert torch.equal(bias, torch.full((2, 4), 3.0))


def layer_norm_grads_by_autograd(output_grad, x, eps, centred):
    """In float64 on the CPU."""
    x, output_grad = (t.double().cpu().reshape(len(x), x.shape[1:-1].numel(), x.shape[-1]) for t in (x, output_grad))
    centred = x - x.mean(2, True) if centred else x
    normalised = centred / (centred.square().mean(2, True) + eps).sqrt()
    return affine_grads_by_autograd(normalised, output_grad, (len(x), 1, x.shape[2]))


# B, ..., n.
SEQUENCES = {"short": (3, 7, 33), "long": (2, 1_003, 17), "one sample": (1, 130, 16), "one place": (5, 1, 100)}
SEQUENCES |= {"no places": (2, 0, 5), "no numbers": (2, 3, 0), "vectors": (4, 9), "images": (2, 3, 5, 8)}
LAYER_NORMS = [f"{norm}, {name}" for norm in ("LayerNorm", "RMSNorm") for name in SEQUENCES]


def sample_layer_norm(name, dtype, device="cpu", layout="contiguous", offset=0.3):
    norm, shape = name.split(", ")
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    pair = [torch.randn(SEQUENCES[shape], generator=generator).add_(shift) for shift in (0, offset)]
    return *laid_out([x.to(device, dtype) for x in pair], layout), 1e-5, norm == "LayerNorm"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm_grads_are_those_of_each_sample_alone(name, dtype, device):
    arguments = sample_layer_norm(name, dtype, device)
    for result, wanted in zip(ops.layer_norm_grads(*arguments), layer_norm_grads_by_autograd(*arguments), strict=True):
        assert result.dtype == dtype
        assert result.shape == wanted.shape
        assert_close(result.cpu(), wanted, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_layer_norm_grads_of_any_layout(norm, layout, device):
    arguments = sample_layer_norm(f"{norm}, short", torch.float32, device, layout)
    for result, wanted in zip(ops.layer_norm_grads(*arguments), layer_norm_grads_by_autograd(*arguments), strict=True):
        assert_close(result.cpu(), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [300.0, -1e4])
@pytest.mark.parametrize("shape", ["short", "long", "one sample", "one place"])
def test_layer_norm_grads_of_a_large_mean_keep_their_digits(shape, offset, device):
    arguments = sample_layer_norm(f"LayerNorm, {shape}", torch.float32, device, offset=offset)
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's normalised input has fewer digits")
    assert_close(ops.layer_norm_grads(*arguments)[0].cpu(), layer_norm_grads_by_autograd(*arguments)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_layer_norm_grads_of_constant_rows_are_finite(device):
    ones = torch.ones(2, 4, 30, device=device)
    weight, bias = (t.cpu() for t in ops.layer_norm_grads(ones, 7.7 * ones, 1e-5))
    assert torch.allclose(weight, torch.zeros(2, 30), atol=1e-3)
    assert torch.equal(bias, torch.full((2, 30), 4.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_layer_norm_grads_of_many_places_do_not_lose_digits(norm, device):
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's sums have fewer digits")
    x, centred = torch.rand(1, 100_000, 4, generator=torch.Generator().manual_seed(0)).to(device), norm == "LayerNorm"
    results = ops.layer_norm_grads(x, x, 1e-5, centred)
    for result, wanted in zip(results, layer_norm_grads_by_autograd(x, x, 1e-5, centred), strict=True):
        assert relative_error(result.cpu(), wanted) < 5e-7


# Operators on layers, by what they are called with.
LAYER_CALLS = {f"conv_weight_grads, {name}": ("conv_weight_grads", sample_convolution, name) for name in CONVOLUTIONS}
LAYER_CALLS |= {f"group_norm_grads, {name}": ("group_norm_grads", sample_norm, name) for name in NORM_SHAPES}
LAYER_CALLS |= {f"layer_norm_grads, {name}": ("layer_norm_grads", sample_layer_norm, name) for name in LAYER_NORMS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", LAYER_CALLS)
def test_gradients_of_layers_are_the_same_bits_for_any_threads_and_layout(call, dtype):
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's own sums depend on the number of threads")
    operator, sample, name = LAYER_CALLS[call]

    def call(layout):
        return getattr(ops, operator)(*sample(name, dtype, layout=layout))

    assert_same_bits(on_threads((1, 2, 3, 5), call, THREADED_LAYOUTS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("call", LAYER_CALLS)
def test_gradients_of_layers_pass_opcheck(call, layout, device):
    operator, sample, name = LAYER_CALLS[call]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for dtype in (torch.float32, torch.bfloat16):
        arguments = sample(name, dtype, device, layout)
        if operator == "conv_weight_grads":
            arguments += (torch.empty_like(ops.conv_weight_grads(*arguments)),)
        torch.library.opcheck(getattr(torch.ops.rgd_ext, operator).default, arguments, test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "call", ["conv_weight_grads, 2-d, groups", "group_norm_grads, space", "layer_norm_grads, RMSNorm, short"]
)
def test_gradients_of_layers_compile_without_graph_breaks(call, device):
    operator, sample, name = LAYER_CALLS[call]
    function, arguments = getattr(ops, operator), sample(name, torch.float32, device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for result, wanted in zip(leaves(compiled(*arguments)), leaves(function(*arguments)), strict=True):
        assert torch.equal(result, wanted)


# Kind, output gradient, input, groups, epsilon, whether there is a bias.
FORMED = {
    "linear": ("linear", (3, 5, 4), (3, 5, 7), 1, 0.0, True),
    "linear without bias": ("linear", (3, 2, 1), (3, 2, 40), 1, 0.0, False),
    "linear without places": ("linear", (3, 0, 4), (3, 0, 7), 1, 0.0, True),
    "wide linear": ("linear", (3, 9, 70), (3, 9, 33), 1, 0.0, True),
    "LayerNorm": ("layer_norm", (3, 5, 17), (3, 5, 17), 1, 1e-3, True),
    "LayerNorm without bias": ("layer_norm", (3, 9), (3, 9), 1, 1e-5, False),
    "RMSNorm": ("rms_norm", (3, 70, 6), (3, 70, 6), 1, 1e-2, False),
    "GroupNorm": ("group_norm", (3, 6, 4, 2), (3, 6, 4, 2), 2, 1e-3, True),
}


def formed_layers(names, dtype, device="cpu", layout="contiguous"):
    """Arguments of `layer_grads`."""
    kinds, grads, inputs, groups, eps, biases = zip(*[FORMED[name] for name in names], strict=True)
    generator = torch.Generator().manual_seed(0)
    grads, inputs = ([torch.randn(s, generator=generator).to(device, dtype) for s in some] for some in (grads, inputs))
    return list(kinds), laid_out(grads, layout), laid_out(inputs, layout), list(groups), list(eps), list(biases)


def formed_by_autograd(kind, output_grad, x, groups, eps, has_bias):
    """In float64 on the CPU, (B, D)."""
    if kind == "linear":
        x, e = x.double().cpu(), output_grad.double().cpu()
        pair = [torch.stack([grad.T @ sample for grad, sample in zip(e, x, strict=True)]), e.sum(1)]
    elif kind == "group_norm":
        pair = group_norm_grads_by_autograd(output_grad, x, groups, eps)
    else:
        pair = layer_norm_grads_by_autograd(output_grad, x, eps, kind == "layer_norm")
    return torch.cat([gradient.flatten(1) for gradient in pair[: 1 + has_bias]], 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_grads_are_side_by_side(dtype, layout, device):
    arguments = formed_layers(FORMED, dtype, device, layout)
    result, columns = torch.ops.rgd_ext.layer_grads(*arguments).cpu(), []
    assert result.dtype == dtype
    for layer in zip(*arguments, strict=True):
        columns.append(formed_by_autograd(*layer))
        assert_close(result[:, sum(c.shape[1] for c in columns[:-1]) :][:, : columns[-1].shape[1]], columns[-1], dtype)
    assert result.shape == torch.cat(columns, 1).shape


def test_layer_grads_are_the_same_bits_for_any_threads_and_those_of_single_layers():
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's own sums depend on the number of threads")
    arguments = formed_layers(FORMED, torch.float32)
    results = list(on_threads((1, 2, 5), lambda: torch.ops.rgd_ext.layer_grads(*arguments)))
    assert_same_bits(results)
    _, e, x, groups, eps, _ = (argument[-1] for argument in arguments)  # a GroupNorm
    assert torch.equal(results[0][0][:, -12:], torch.cat(ops.group_norm_grads(e, x, groups, eps), 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", [[*FORMED], ["LayerNorm"]], ids=["all", "one"])
def test_layer_grads_pass_opcheck(names, device):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for dtype in (torch.float32, torch.bfloat16):
        arguments = formed_layers(names, dtype, device)
        torch.library.opcheck(torch.ops.rgd_ext.layer_grads.default, arguments, test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [[()], [(3,), (2, 5), ()], [(100_003,)]], ids=str)
def test_squared_norm(shapes, dtype, device):
    vector = [torch.randn(shape).to(device, dtype) for shape in shapes]
    vector[-1] = vector[-1].expand(2, *vector[-1].shape).movedim(0, -1)  # not contiguous
    result = torch.ops.rgd_ext.squared_norm(vector)
    assert result.shape == ()
    assert_close(result.cpu(), sum(v.double().cpu().square().sum() for v in vector), dtype)
    torch.library.opcheck(
        torch.ops.rgd_ext.squared_norm.default, (vector,), test_utils=("test_schema", "test_faketensor")
    )


def test_reference_refuses_kinds_and_places_that_do_not_exist():
    with pytest.raises(ValueError, match="kind is dense"):
        reference.layer_grads(["dense"], [X], [X], [1], [0.0], [True])
    with pytest.raises(ValueError, match="more places than a convolution"):
        reference.conv_gram(E, X, [4], [1], [0], [1])


def spectra(size):
    """Eigenvalues that are hard to find, by name."""
    generator = torch.Generator().manual_seed(size)
    values = torch.rand(size, generator=generator, dtype=torch.float64) / 2
    one, half = torch.ones(size, dtype=torch.float64), size // 2
    result = {"random": values, "zero": 0 * one, "repeated": one, "rank one": torch.eye(size).double()[0]}
    result["evenly spaced"] = torch.linspace(0, 1, size, dtype=torch.float64)
    for gap in (1e-3, 1e-6, 1e-9, 1e-12):
        top = 1 - gap * torch.linspace(0, 1, half + 1, dtype=torch.float64)
        result[f"cluster of {gap}"] = torch.cat([top, values[half + 1 :]])
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 17, 128, 300])
@pytest.mark.parametrize("name", spectra(1))
def test_largest_eigenvalue_of_hard_spectra(name, size, dtype, device):
    """Matrices in float64 whose entries have rounding errors of `dtype`."""
    values, ulp = spectra(size)[name].to(device), rounding(dtype, torch.device(device))
    rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)).double())[0]
    for basis in (rotation.to(device), torch.eye(size).double().to(device)):
        for scale in (1.0, 1e-200, 1e200):
            matrix = (basis * values) @ basis.T * scale
            found, wanted = ops.largest_eigenvalue(matrix, ulp).item(), values.max().item() * scale
            assert abs(found - wanted) <= max(1e-12, 2 * ulp) * wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-37, 1e37])
@pytest.mark.parametrize("name", spectra(1))
def test_largest_eigenvalue_of_float32_close_to_its_limits(name, scale, device):
    rotation = torch.linalg.qr(torch.randn(70, 70, generator=torch.Generator().manual_seed(1)).double())[0]
    matrix = ((rotation * spectra(70)[name]) @ rotation.T * scale).float()
    wanted = torch.linalg.eigvalsh(matrix.double())[-1].clamp(min=0)
    found = ops.largest_eigenvalue(matrix.to(device)).double().cpu()
    assert abs(found - wanted) <= 3 * rounding(torch.float32, torch.device(device)) * wanted


@pytest.mark.parametrize("device", DEVICES)
def test_largest_eigenvalue_whatever_its_vector(device):
    # Some of these vectors are all but orthogonal to the one that the search starts from.
    angles = torch.linspace(0, torch.pi, 4000, dtype=torch.float64, device=device)
    ones, zeros = torch.ones_like(angles), torch.zeros_like(angles)
    vectors = torch.stack([angles.cos(), angles.sin(), zeros], 1)
    matrices = vectors[:, :, None] * vectors[:, None] + torch.stack([zeros, zeros, ones / 2], 1).diag_embed()
    assert_close(torch.stack([ops.largest_eigenvalue(matrix) for matrix in matrices]), ones)


@pytest.mark.parametrize("device", DEVICES)
def test_largest_eigenvalue_beyond_float32_is_infinite(device):
    assert ops.largest_eigenvalue(torch.full((4, 4), 3e38, device=device)) == torch.inf


@pytest.mark.skipif(not rgd_ext.build_info()["compiled"], reason="the reference is as exact as can be")
@pytest.mark.parametrize("device", DEVICES)
def test_largest_eigenvalue_is_no_more_exact_than_the_ulp_asks_for(device):
    matrix = torch.diag(torch.linspace(0, 1, 200, dtype=torch.float64, device=device))
    for ulp in (1e-2, 1e-4):
        assert 1e-9 < 1 - ops.largest_eigenvalue(matrix, ulp).item() <= ulp / 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_largest_eigenvalue_of_a_centred_gramian(dtype, device):
    grads = sample_grads("wide, many samples", dtype, device)[0]
    centred = grads - grads.mean(0)
    # Its null space holds the vector of ones.
    gram = centred @ centred.T
    largest = ops.largest_eigenvalue(gram)
    assert largest.dtype == dtype
    assert_close(largest, torch.linalg.eigvalsh(gram.double())[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", [(0, 0), (3, 5)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_largest_eigenvalue_of_what_is_not_finite_is_nan(value, place, device):
    matrix = torch.eye(9, device=device)
    matrix[place] = value
    assert ops.largest_eigenvalue(matrix).isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_largest_eigenvalue_of_rounding_errors_is_not_negative(device):
    assert ops.largest_eigenvalue(-1e-18 * torch.eye(5, device=device)).item() == 0


def test_largest_eigenvalue_gives_the_same_bits_for_any_number_of_threads():
    matrix, before = ops.gram(torch.randn(700, 900, dtype=torch.float64)), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.largest_eigenvalue(matrix))
    finally:
        torch.set_num_threads(before)
    if rgd_ext.build_info()["compiled"]:
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("device", DEVICES)
def test_operators_on_gramians_work_under_compile_and_opcheck(device):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for dtype in DTYPES:
        layers = sample_layers("few", dtype, device)
        torch.library.opcheck(torch.ops.rgd_ext.ghost_gram.default, layers, test_utils=tests)
        weighted = (*layers, torch.ones(7, dtype=dtype, device=device))
        torch.library.opcheck(torch.ops.rgd_ext.ghost_combine.default, weighted, test_utils=tests)
    for dtype in (torch.float32, torch.float64):
        gram = ops.gram(torch.randn(5, 7, dtype=dtype, device=device))
        torch.library.opcheck(torch.ops.rgd_ext.largest_eigenvalue.default, (gram, 1e-7), test_utils=tests)
        torch.library.opcheck(torch.ops.rgd_ext.gram_moments.default, (gram,), test_utils=tests)
        statistics = gram[0, 0], gram[0], gram[1], gram[2, 2], 1e-7
        torch.library.opcheck(torch.ops.rgd_ext.sample_weights.default, statistics, test_utils=tests)

    def weights(inputs, output_grads):
        gram = ops.ghost_gram(inputs, output_grads, [True] * len(inputs))
        *statistics, centred = ops.gram_moments(gram)
        return ops.sample_weights(*statistics, 1 / ops.largest_eigenvalue(centred), 1e-7)[1]

    layers = sample_layers("few", torch.float32, device)[:2]
    compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*layers), weights(*layers))


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_matches_float64_reference(name, shapes, dtype, device):
    grads = sample_grads(shapes, dtype, device)
    results, wanted = leaves(CALLS[name](grads)), leaves(expected(name, grads))
    assert [r.shape for r in results] == [w.shape for w in wanted]
    assert all(r.dtype in (dtype, reference.accumulate_dtype(dtype)) for r in results)
    scale = max(w.abs().max() if w.numel() else 0 for w in wanted)
    for result, want in zip(results, wanted, strict=True):
        assert torch.allclose(result.double().cpu(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * float(scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_memory_layout_does_not_matter(name, layout, device):
    grads = laid_out(sample_grads("many", torch.float32, device), layout)
    results = leaves(CALLS[name](grads))
    for result, want in zip(results, leaves(CALLS[name]([g.contiguous() for g in grads])), strict=True):
        assert_close(result, want)
        assert result.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", ["many", "wide", "wide, many samples", "hundred tensors"])
@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_threads_gives_the_same_bits(name, shapes, dtype):
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's own reductions depend on the number of threads")
    grads = sample_grads(shapes, dtype)
    assert_same_bits(on_threads((1, 2, 3, 5), lambda: CALLS[name](grads)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("shapes", ["many", "empty parameter"])
@pytest.mark.parametrize("name", ["moments", "scalar_moments", "combine", "diffusion_mv", "gram", "precondition"])
def test_opcheck(name, shapes, layout, dtype, device):
    grads = laid_out(sample_grads(shapes, dtype, device), layout)
    accumulate = reference.accumulate_dtype(dtype)
    extra = {
        "moments": (),
        "scalar_moments": (),
        "gram": (),
        "combine": (weights_for(grads).to(accumulate),),
        "diffusion_mv": (vectors_for(grads, 2),),
        "precondition": (torch.tensor(0.1, dtype=accumulate, device=device),),
    }
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.rgd_ext, name).default, (grads, *extra[name]), test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_graph_breaks(name, device):
    grads = sample_grads("many", torch.float32, device)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for result, want in zip(leaves(compiled(grads)), leaves(CALLS[name](grads)), strict=True):
        assert torch.equal(result, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", ["flat", "many", "wide", "wide, many samples"])
def test_epsilon_zero_and_equal_weights_give_the_mean_bitwise(shapes, dtype, device):
    grads = sample_grads(shapes, dtype, device)
    mean, _, _ = ops.moments(grads)
    equal = torch.full((len(grads[0]),), 1 / len(grads[0]), dtype=reference.accumulate_dtype(dtype), device=device)
    for results in (ops.precondition(grads, 0.0), ops.combine(grads, equal)):
        assert all(torch.equal(a, b) for a, b in zip(results, mean, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tensor_is_a_list_of_one(dtype, device):
    (grads,) = sample_grads("flat", dtype, device)
    for name in ("moments", "gram"):
        for a, b in zip(leaves(getattr(ops, name)(grads)), leaves(getattr(ops, name)([grads])), strict=True):
            assert torch.equal(a, b)
    assert isinstance(ops.precondition(grads, 0.1), list)


@pytest.mark.parametrize("device", DEVICES)
def test_gram_is_exactly_symmetric(device):
    for shapes in SHAPES:
        gram = ops.gram(sample_grads(shapes, torch.float32, device))
        assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_agree_with_the_explicit_diffusion_matrix(device):
    grads = sample_grads("many", torch.float64, device)
    rows = torch.cat([g.flatten(1) for g in grads], 1)
    matrix, mean = diffusion_matrix(rows), rows.mean(0)
    _, alignments, squared_norms = ops.moments(grads)
    assert_close(alignments, (rows - mean) @ mean)
    assert_close(squared_norms.mean(), matrix.trace())
    assert_close(flat(ops.diffusion_mv(grads, vectors_for(grads))), matrix @ flat(vectors_for(grads)))
    assert_close(flat(ops.precondition(grads, 0.3)), mean - 0.3 * matrix @ mean)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CALLS)
def test_values_that_are_not_finite_flow_through(name, value, device):
    grads = sample_grads("many", torch.float32, device)
    grads[1][2, 3] = value
    assert any(not r.isfinite().all() for r in leaves(CALLS[name](grads)))


G, S = torch.ones(3, 4), torch.ones(())
E, X, W = torch.ones(2, 6, 5), torch.ones(2, 4, 7), torch.ones(2, 6, 4, 3)
BAD = {
    "no tensors": (lambda: ops.moments([]), ValueError, "empty"),
    "empty batch": (lambda: ops.gram(torch.ones(0, 4)), ValueError, r"empty batch.*\(0, 4\)"),
    "scalar": (lambda: ops.moments(torch.tensor(1.0)), ValueError, "scalar"),
    "integers": (lambda: ops.moments(torch.ones(3, 4, dtype=torch.int64)), TypeError, "torch.int64"),
    "not a tensor": (lambda: ops.moments([[1.0]]), TypeError, "list"),
    "batch sizes": (lambda: ops.moments([G, G[:2]]), ValueError, "3 samples and grads.1. has 2"),
    "dtypes": (lambda: ops.moments([G, G.double()]), TypeError, r"torch\.float32.*torch\.float64"),
    "devices": (lambda: ops.moments([G, G.to("meta")]), ValueError, "cpu.*meta"),
    "weights": (lambda: ops.combine(G, torch.ones(4)), ValueError, r"\(4,\).*3 samples"),
    "weights on another device": (lambda: ops.combine(G, torch.ones(3, device="meta")), ValueError, "meta.*cpu"),
    "vectors": (lambda: ops.diffusion_mv(G, torch.ones(5)), ValueError, r"\(5,\).*\(4,\)"),
    "number of vectors": (lambda: ops.diffusion_mv(G, [torch.ones(4)] * 2), ValueError, "1 tensors and vectors 2"),
    "dtype of vectors": (lambda: ops.diffusion_mv(G, torch.ones(4).double()), ValueError, "torch.float64"),
    "vectors disagree": (
        lambda: ops.diffusion_mv([G, G], [torch.ones(2, 4), torch.ones(3, 4)]),
        ValueError,
        r"\(2,\), \(3,\)",
    ),
    "layers": (lambda: ops.ghost_gram([G], [G, G], [True]), ValueError, "1 inputs, 2 output gradients and 1 biases"),
    "biases": (lambda: ops.ghost_gram([G], [G], []), ValueError, "0 biases"),
    "weights of layers": (lambda: ops.ghost_combine([G], [G], [True], S), ValueError, r"weights has shape \(\).* 3 "),
    "integer weights": (lambda: ops.ghost_combine([G], [G], [True], G[:, 0].long()), ValueError, "torch.int64"),
    "combined layers": (lambda: ops.ghost_combine([G], [G, G], [True], G[:, 0]), ValueError, "1 inputs, 2 output"),
    "layer of sequences": (lambda: ops.ghost_gram([G[None]], [G[None]], [True]), ValueError, r"\(1, 3, 4\)"),
    "layer of other dtype": (lambda: ops.ghost_gram([G.double()], [G], [True]), TypeError, "disagree"),
    "not square": (lambda: ops.largest_eigenvalue(G), ValueError, r"\(3, 4\)"),
    "gramian not square": (lambda: ops.gram_moments(G), ValueError, r"gram has shape \(3, 4\)"),
    "gramian of halves": (lambda: ops.gram_moments(G[:, :3].half()), TypeError, "float16"),
    "statistics of other sizes": (lambda: ops.sample_weights(S, G[0], G[0, :3], S, 1e-7), ValueError, r"\(3,\)"),
    "epsilon for each sample": (lambda: ops.sample_weights(S, G[0], G[0], G[0], 1e-7), ValueError, "epsilon has shape"),
    "epsilon of other dtype": (lambda: ops.sample_weights(S, G[0], G[0], S.double(), 1e-7), ValueError, "float64"),
    "statistics in half": (lambda: ops.sample_weights(*[t.half() for t in (S, G[0], G[0], S)], 1e-7), TypeError, "16"),
    "empty matrix": (lambda: ops.largest_eigenvalue(G[:0, :0]), ValueError, r"\(0, 0\)"),
    "ulp": (lambda: ops.largest_eigenvalue(torch.eye(2), -1e-7), ValueError, "ulp is -1e-07"),
    "dtype of a matrix": (lambda: ops.largest_eigenvalue(torch.eye(2).half()), TypeError, "torch.float16"),
    "matrices": (lambda: ops.conv_weight_grads(G, G, [], [], [], [], 1), ValueError, r"\(3, 4\).*one to three"),
    "samples": (lambda: ops.conv_weight_grads(E[:1], X, [3], [1], [0], [1], 1), ValueError, "1 samples.* has 2"),
    "kernel": (lambda: ops.conv_weight_grads(E, X, [3, 3], [1], [0], [1], 1), ValueError, r"kernel is \(3, 3\)"),
    "stride": (lambda: ops.conv_weight_grads(E, X, [3], [0], [0], [1], 1), ValueError, r"stride is \(0,\)"),
    "padding": (lambda: ops.conv_weight_grads(E, X, [3], [1], [-1], [1], 1), ValueError, r"padding is \(-1,\)"),
    "groups": (lambda: ops.conv_weight_grads(E, X, [3], [1], [0], [1], 4), ValueError, "groups is 4.*6 and 4"),
    "places": (lambda: ops.conv_weight_grads(E, X, [4], [1], [0], [1], 1), ValueError, "5 places.*at most 4"),
    "groups of a norm": (lambda: ops.group_norm_grads(X, X, 3, 1e-5), ValueError, "groups is 3.*4 channels"),
    "shape of a norm": (lambda: ops.group_norm_grads(E, X, 1, 1e-5), ValueError, r"\(2, 6, 5\).*\(2, 4, 7\)"),
    "shape of a layer norm": (lambda: ops.layer_norm_grads(E, X, 1e-5), ValueError, r"\(2, 6, 5\).*\(2, 4, 7\)"),
    "layer norm of numbers": (lambda: ops.layer_norm_grads(G[0], G[0], 1e-5), ValueError, r"\(4,\).*\(B, ..., n\)"),
    "dtypes of a layer norm": (lambda: ops.layer_norm_grads(X, X.double(), 1e-5), TypeError, "disagree"),
    "epsilon": (lambda: ops.precondition(G, float("nan")), ValueError, "epsilon is nan"),
    "epsilon of two": (lambda: ops.precondition(G, torch.ones(2)), ValueError, r"shape \(2,\)"),
}


def move_examples(device, monkeypatch):
    """What BAD and RAW_BAD are called with, to a device."""
    for name in "GSEXW":
        monkeypatch.setitem(globals(), name, globals()[name].to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, device, monkeypatch):
    move_examples(device, monkeypatch)
    call, error, match = BAD[name]
    with torch.device(device), pytest.raises(error, match=match.replace("cpu", device)):
        call()


RAW_BAD = {
    "no tensors": lambda: torch.ops.rgd_ext.moments([]),
    "empty batch": lambda: torch.ops.rgd_ext.gram([torch.ones(0, 4)]),
    "batch sizes": lambda: torch.ops.rgd_ext.moments([G, G[:2]]),
    "dtypes": lambda: torch.ops.rgd_ext.moments([G, G.double()]),
    "integers": lambda: torch.ops.rgd_ext.moments([torch.ones(3, 4, dtype=torch.int64)]),
    "weights": lambda: torch.ops.rgd_ext.combine([G], torch.ones(2)),
    "vectors": lambda: torch.ops.rgd_ext.diffusion_mv([G], [torch.ones(5)]),
    "epsilon": lambda: torch.ops.rgd_ext.precondition([G], torch.ones(2)),
    "biases": lambda: torch.ops.rgd_ext.ghost_gram([G], [G], []),
    "layers": lambda: torch.ops.rgd_ext.ghost_gram([G], [G, G], [True, True]),
    "weights of layers": lambda: torch.ops.rgd_ext.ghost_combine([G], [G], [True], S),
    "layer of sequences": lambda: torch.ops.rgd_ext.ghost_gram([G[None]], [G[None]], [True]),
    "rows of a layer": lambda: torch.ops.rgd_ext.ghost_gram([G[:2]], [G], [True]),
    "dtype of a layer": lambda: torch.ops.rgd_ext.ghost_gram([G.double()], [G], [True]),
    "not square": lambda: torch.ops.rgd_ext.largest_eigenvalue(G, 1e-7),
    "gramian not square": lambda: torch.ops.rgd_ext.gram_moments(G),
    "statistics of other sizes": lambda: torch.ops.rgd_ext.sample_weights(S, G[0], G[0, :3], S, 1e-7),
    "statistics without samples": lambda: torch.ops.rgd_ext.sample_weights(S, G[0, :0], G[0, :0], S, 1e-7),
    "epsilon for each sample": lambda: torch.ops.rgd_ext.sample_weights(S, G[0], G[0], G[0], 1e-7),
    "epsilon of other dtype": lambda: torch.ops.rgd_ext.sample_weights(S, G[0], G[0], S.double(), 1e-7),
    "dtype of a matrix": lambda: torch.ops.rgd_ext.largest_eigenvalue(torch.eye(2).half(), 1e-7),
    "matrices": lambda: torch.ops.rgd_ext.conv_weight_grads(G, G, [], [], [], [], 1, G),
    "kernel": lambda: torch.ops.rgd_ext.conv_weight_grads(E, X, [3, 3], [1], [0], [1], 1, W),
    "groups": lambda: torch.ops.rgd_ext.conv_weight_grads(E, X, [3], [1], [0], [1], 4, W),
    "places": lambda: torch.ops.rgd_ext.conv_weight_grads(E, X, [4], [1], [0], [1], 1, W),
    "shape of a result": lambda: torch.ops.rgd_ext.conv_weight_grads(E, X, [3], [1], [0], [1], 1, W[:, :5]),
    "strides of a result": lambda: torch.ops.rgd_ext.conv_weight_grads(
        E, X, [3], [1], [0], [1], 1, W.mT.contiguous().mT
    ),
    "kernel of a Gramian": lambda: torch.ops.rgd_ext.conv_gram(E, X, [3, 3], [1], [0], [1]),
    "places of a Gramian": lambda: torch.ops.rgd_ext.conv_gram(E, X, [4], [1], [0], [1]),
    "no channels": lambda: torch.ops.rgd_ext.conv_gram(E, X[:, :0], [3], [1], [0], [1]),
    "no output channels": lambda: torch.ops.rgd_ext.conv_scalar_moments(E[:, :0], X, [3], [1], [0], [1]),
    "dtypes of moments": lambda: torch.ops.rgd_ext.conv_scalar_moments(E, X.double(), [3], [1], [0], [1]),
    "groups of a norm": lambda: torch.ops.rgd_ext.group_norm_grads(X, X, 3, 1e-5),
    "shape of a norm": lambda: torch.ops.rgd_ext.group_norm_grads(E, X, 1, 1e-5),
    "shape of a layer norm": lambda: torch.ops.rgd_ext.layer_norm_grads(E, X, 1e-5, True),
    "layer norm of numbers": lambda: torch.ops.rgd_ext.layer_norm_grads(G[0], G[0], 1e-5, True),
    "kind of a layer": lambda: torch.ops.rgd_ext.layer_grads(["dense"], [X], [X], [1], [0.0], [True]),
    "kinds of layers": lambda: torch.ops.rgd_ext.layer_grads(["linear"] * 2, [X], [X], [1], [0.0], [True]),
    "no layers": lambda: torch.ops.rgd_ext.layer_grads([], [], [], [], [], []),
    "places of a layer": lambda: torch.ops.rgd_ext.layer_grads(["linear"], [E], [X], [1], [0.0], [True]),
    "vectors of a layer": lambda: torch.ops.rgd_ext.layer_grads(["linear"], [G], [G], [1], [0.0], [True]),
    "groups of a layer": lambda: torch.ops.rgd_ext.layer_grads(["group_norm"], [X], [X], [3], [0.0], [True]),
    "shape of a layer": lambda: torch.ops.rgd_ext.layer_grads(["rms_norm"], [E], [X], [1], [0.0], [True]),
    "batches of layers": lambda: torch.ops.rgd_ext.layer_grads(
        ["layer_norm"] * 2, [G, G[:2]], [G, G[:2]], [1, 1], [0.0, 0.0], [True, True]
    ),
    "dtypes of layers": lambda: torch.ops.rgd_ext.layer_grads(["linear"], [X], [X.double()], [1], [0.0], [True]),
}


@pytest.mark.parametrize("name", RAW_BAD)
def test_compiled_kernels_check_what_reaches_them(name):
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("there are no compiled kernels")
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        RAW_BAD[name]()
