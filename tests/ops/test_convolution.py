"""Weight gradients of convolutions and their statistics, against autograd sample by sample."""

import pytest
import torch
from operator_cases import (
    CONVOLUTIONS,
    DEVICES,
    DTYPES,
    LAYOUTS,
    assert_same_bits,
    on_threads,
    opcheck,
    sample_convolution,
    weight_grads_by_autograd,
)
from oracle import TOLERANCE, assert_close

import rgd_ext
from rgd_ext import linalg, ops
from rgd_ext.ops import DEFAULTS


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
    assert {result.dtype for result in results} == {linalg.accumulate_dtype(dtype)}
    assert torch.equal(results[0], results[0].T)
    largest = results[0].diagonal().max().item()
    for result, wanted in zip(results, conv_statistics_by_autograd(*arguments), strict=True):
        assert result.shape == wanted.shape
        difference = (result.double().cpu() - wanted).abs().max().item()  # a single sample has no alignment
        assert difference < TOLERANCE[linalg.accumulate_dtype(dtype)] * largest


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


def test_default_kernels_of_conv_statistics_in_blocks(monkeypatch):
    monkeypatch.setattr("rgd_ext.convolutions.block_elements", lambda device: 1)
    *arguments, _ = sample_convolution("2-d, several panels", torch.float64)
    results = [DEFAULTS["conv_gram"](*arguments), *DEFAULTS["conv_scalar_moments"](*arguments)]
    for result, wanted in zip(results, conv_statistics_by_autograd(*arguments), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", ["conv_gram", "conv_scalar_moments"])
def test_conv_statistics_pass_opcheck(operator, device):
    for dtype in (torch.float32, torch.bfloat16):
        *arguments, _ = sample_convolution("2-d", dtype, device)
        opcheck(operator, arguments)
