"""Contributions of 16 bits lose nothing: of linear layers on CUDA under autocast, tried on the CPU."""

import copy

import pytest
import torch
from capturing import captured_grad
from contribution_cases import (
    as_one_sample,
    collected,
    of_linear_layer,
    sum_of_uses,
    union_of_batches,
    with_blocks,
    with_strategy,
)
from models import GPT
from oracle import assert_close, relative_error
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rgd_ext
from rgd_ext.contributions.convolution import Convolution
from rgd_ext.contributions.outer import Bias, Ghost, Outer
from rgd_ext.contributions.rows import Rows
from rgd_ext.convolutions import Geometry

B, T, N, M = 5, 7, 6, 4
SHAPE = torch.Size((M, N))
HALVES = [torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class OnCuda(torch.Tensor):
    """A tensor on the CPU that is treated like those of CUDA, whose products may be of another dtype."""

    is_cpu, is_cuda = False, True

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.mm, torch.bmm) and (dtype := kwargs.pop("out_dtype", None)):
            assert args[0].dtype == args[1].dtype
            args = [x.to(dtype) for x in args]
        return super().__torch_function__(func, types, args, kwargs)


def mixed(kind, dtype, scale=1.0, device="cpu"):
    """Contributions in float32 of A and E in `dtype`, and in float64, (B, m, n)."""
    a, e = torch.randn(B, T, N).to(device, dtype), (scale * torch.randn(B, T, M)).to(device, dtype)
    there = [x.as_subclass(OnCuda) if device == "cpu" else x for x in (a, e)]
    return kind(*there, SHAPE, torch.float32), e.double().mT @ a.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", [Outer, Ghost])
def test_products_of_16_bits_lose_nothing(kind, dtype, device, monkeypatch):
    with_blocks(monkeypatch, 2 * B * N)
    factor, grads = mixed(kind, dtype, device=device)
    vector, rows = torch.randn(SHAPE).to(device), grads.flatten(1)
    statistics = zip(factor.moments(), rgd_ext.ops.scalar_moments(rows), strict=True)
    for result, wanted in (
        (factor.gram(), rows @ rows.T),
        (factor.align(vector), rows @ vector.double().flatten()),
        (factor.dense(), grads),
        (Bias(factor).dense(), factor.output_grads.double().sum(1)),
        *statistics,
    ):
        assert result.dtype == torch.float32
        assert_close(result, wanted)
    assert factor.example.dtype == Bias(factor).example.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_small_correction_of_the_weights_is_not_rounded_away(dtype, scale, device):
    factor, grads = mixed(Outer, dtype, scale, device)
    corrections = 1e-3 * torch.randn(B).to(device)
    found = factor.combine(1 + corrections)
    assert found.dtype == torch.float32
    rest = found - factor.combine(torch.ones_like(corrections))
    # All that 16 bits hold of the weights would be 1.
    assert relative_error(rest, torch.einsum("b,bmn->mn", corrections.double(), grads)) < 3e-2


# Inputs of a sample, and contributions from inputs and output gradients.
INPUTS = {
    "sequences": (lambda: torch.randn(B, T, N), lambda x, e: Outer(x, e, SHAPE)),
    "vectors": (lambda: torch.randn(B, N), lambda x, e: Outer(x, e[:, 0].contiguous(), SHAPE)),
    "embedding": (lambda: torch.randint(3, (B, T)), lambda x, e: Rows.of_sequences(x.long(), e, torch.Size((3, M)))),
    "convolution": (
        lambda: torch.randn(B, N, T + 2),
        lambda x, e: Convolution(e.mT, x, torch.Size((M, N, 3)), Geometry((3,), (1,), (0,), (1,), 1)),
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_a_small_correction_is_all_that_is_left_of_opposite_gradients(kind, dtype, device):
    inputs, contributions = INPUTS[kind]
    x, e, correction = inputs().to(dtype), torch.randn(B, T, M).to(dtype), 1e-3 * torch.rand(B)
    pairs = (x, x), (e, -e), (1 + correction, 1 - correction)
    x, e, weights = (torch.cat(pair).to(device) for pair in pairs)
    factor, grads = contributions(x, e), contributions(x.double(), e.double()).dense()
    for found in (factor.combine(weights), collected([factor]).combine(weights / (2 * B))[0]):
        assert found.dtype == dtype
        assert_close(found, torch.einsum("b,b...->...", weights.double(), grads))


def test_sums_unions_and_merged_samples_stay_in_the_dtype_of_the_parameter():
    (one, grads), (two, others) = mixed(Outer, torch.bfloat16), mixed(Outer, torch.bfloat16)
    for factor, wanted in (
        (sum_of_uses([one, two]), grads + others),
        (union_of_batches([one, two]), torch.cat([grads, others])),
        (as_one_sample(one), grads.sum(0, keepdim=True)),
        (with_strategy(one, "ghost"), grads),
    ):
        assert factor.example.dtype == torch.float32
        assert_close(factor.dense(), wanted)


class NothingWidened(TorchDispatchMode):
    """Refuses copies of A or E in float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_to_copy", "copy_") and args[0].numel() >= B * T * M:
            assert (kwargs or {}).get("dtype") != torch.float32, f"{func} of {tuple(args[0].shape)}"
        return func(*args, **(kwargs or {}))


CALLS = {
    "gram": lambda factor: factor.gram(),
    "moments": lambda factor: factor.moments()[0],
    "align": lambda factor: factor.align(torch.empty(SHAPE)),
    "combine": lambda factor: factor.combine(torch.empty(B)),
    "dense": lambda factor: factor.dense(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("strategy", ["recompute", "ghost"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nothing_is_widened_on_cuda(dtype, strategy, call):
    with FakeTensorMode(), torch.device("cuda"):
        inputs, grad = torch.empty(B, T, N), torch.empty(B, T, M, dtype=dtype)  # as a LayerNorm gives its input
        with NothingWidened():
            factor = with_strategy(of_linear_layer(inputs, grad, SHAPE)["weight"], strategy)
            assert factor.inputs.dtype == factor.output_grads.dtype == dtype
            assert CALLS[call](factor).dtype == torch.float32


OTHERS = {
    "on the CPU": ("cpu", (B, T, M), torch.float32, True),
    "vectors": ("cuda", (B, M), torch.float32, True),
    "sequences of one": ("cuda", (B, 1, M), torch.float32, True),
    "another rule": ("cuda", (B, T, M), torch.float32, False),
    "float64": ("cuda", (B, T, M), torch.float64, True),
    "bfloat16": ("cuda", (B, T, M), torch.bfloat16, True),
}


@pytest.mark.parametrize("case", OTHERS)
def test_all_else_is_in_the_dtype_of_the_parameters(case):
    device, shape, dtype, is_known = OTHERS[case]
    with FakeTensorMode(), torch.device(device):
        inputs, grad = torch.empty(*shape[:-1], N), torch.empty(shape, dtype=torch.bfloat16)
        found = of_linear_layer(inputs, grad, SHAPE, dtype, is_known)
        for factor in found.values():
            assert factor.signature[-1] == factor.example.dtype == dtype
        assert found["weight"]._inputs.dtype == dtype


@pytest.mark.gpu
def test_a_gpt_under_autocast_on_a_gpu_has_the_direction_of_full_precision():
    model, x = GPT().cuda(), torch.randint(11, (B, 9), device="cuda")
    expected = captured_grad(copy.deepcopy(model), x)
    with torch.autocast("cuda", torch.bfloat16):
        found = captured_grad(model, x)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 0.05
