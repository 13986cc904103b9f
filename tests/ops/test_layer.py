"""What the operators on layers have in common, and the gradients of several layers at a time."""

import pytest
import torch
from operator_cases import (
    CONVOLUTIONS,
    DEVICES,
    DTYPES,
    LAYER_NORMS,
    LAYOUTS,
    NORM_SHAPES,
    THREADED_LAYOUTS,
    assert_same_bits,
    group_norm_grads_by_autograd,
    laid_out,
    layer_norm_grads_by_autograd,
    leaves,
    on_threads,
    opcheck,
    sample_convolution,
    sample_layer_norm,
    sample_norm,
)
from oracle import assert_close

import rgd_ext
from rgd_ext import ops

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
    for dtype in (torch.float32, torch.bfloat16):
        arguments = sample(name, dtype, device, layout)
        if operator == "conv_weight_grads":
            arguments += (torch.empty_like(ops.conv_weight_grads(*arguments)),)
        opcheck(operator, arguments)


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
    for dtype in (torch.float32, torch.bfloat16):
        arguments = formed_layers(names, dtype, device)
        opcheck("layer_grads", arguments)
