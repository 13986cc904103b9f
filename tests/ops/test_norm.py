"""Gradients of the weights and biases of normalisation layers, against autograd sample by sample."""

import pytest
import torch
from operator_cases import (
    DEVICES,
    DTYPES,
    LAYER_NORMS,
    LAYOUTS,
    NORM_SHAPES,
    group_norm_grads_by_autograd,
    layer_norm_grads_by_autograd,
    sample_layer_norm,
    sample_norm,
)
from oracle import assert_close, relative_error

import rgd_ext
from rgd_ext import ops


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
