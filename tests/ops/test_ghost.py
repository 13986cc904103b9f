"""The Gramian and the combination of linear layers, whose gradients are never formed."""

import pytest
import torch
from operator_cases import (
    DEVICES,
    DTYPES,
    LAYERS,
    THREADED_LAYOUTS,
    assert_same_bits,
    laid_out,
    on_threads,
    opcheck,
    sample_layers,
)
from oracle import assert_close

import rgd_ext
from rgd_ext import linalg, ops
from rgd_ext.ops import DEFAULTS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_ghost_gram_is_the_gramian_of_explicit_gradients(name, dtype, device):
    inputs, output_grads, biases = sample_layers(name, dtype, device)
    gram = ops.ghost_gram(inputs, output_grads, biases)
    assert gram.dtype == linalg.accumulate_dtype(dtype)
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
    for operator in (ops.ghost_combine, DEFAULTS["ghost_combine"]):
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ghost_operators_pass_opcheck(dtype, device):
    layers = sample_layers("few", dtype, device)
    opcheck("ghost_gram", layers)
    opcheck("ghost_combine", (*layers, torch.ones(7, dtype=dtype, device=device)))
