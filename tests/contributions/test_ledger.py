"""The ledger of a backward adds up the uses of a parameter, and is used up by its last combination."""

import pytest
import torch
from capturing import double
from oracle import assert_close
from torch import nn

from rgd_ext.contributions.factor import Dense
from rgd_ext.contributions.ledger import Contributions
from rgd_ext.contributions.merge import sum_uses
from rgd_ext.contributions.outer import Outer
from rgd_ext.contributions.vectors import VectorLayers

B, N, M = 5, 3, 4


def weight():
    """A parameter of shape (M, N), and its contributions, (B, M, N), as vectors and as a tensor."""
    x, e = double(B, N), double(B, M)
    return nn.Parameter(double(M, N)), VectorLayers([x], [e], [False]), torch.einsum("bm,bn->bmn", e, x)


USES = {
    "vectors": lambda ledger, p, layers, tensor: ledger.add_vectors([p], layers),
    "tensor": lambda ledger, p, layers, tensor: ledger.add_tensor([p], tensor),
    "factor": lambda ledger, p, layers, tensor: ledger.add_factor(p, Dense(tensor)),
    "outer": lambda ledger, p, layers, tensor: ledger.add_factor(
        p, Outer(*layers.inputs, *layers.output_grads, p.shape)
    ),
}


@pytest.mark.parametrize("first", USES)
@pytest.mark.parametrize("second", USES)
def test_all_uses_of_a_parameter_add_up_in_whatever_form_they_come(first, second):
    parameter, layers, tensor = weight()
    _, others, other = weight()
    single, single_layers, single_tensor = weight()
    ledger = Contributions(B)
    USES[first](ledger, parameter, layers, tensor)
    ledger.add_vectors([single], single_layers)
    USES[second](ledger, parameter, others, other)
    ledger.close(lambda parameter, factors: sum_uses(factors))
    ledger.arrange([parameter, single])
    grads = [B * (tensor + other), B * single_tensor]
    for found, wanted in zip(ledger.dense(), grads, strict=True):
        assert_close(found, wanted)
    rows = torch.cat([g.flatten(1) for g in grads], 1)
    assert_close(ledger.gram(), rows @ rows.T)
    weights = double(B)
    for found, wanted in zip(ledger.combine(weights), grads, strict=True):
        assert_close(found, torch.einsum("b,b...->...", weights, wanted))


def test_parameters_side_by_side_are_cut_apart_and_one_of_them_may_have_another_use():
    first, second = nn.Parameter(double(M, N)), nn.Parameter(double(M))
    matrix, other = double(B, M * N + M), double(B, M)
    ledger = Contributions(B)
    ledger.add_tensor([first, second], matrix)
    ledger.add_tensor([second], other)
    ledger.close(lambda parameter, factors: sum_uses(factors))
    ledger.arrange([first, second])
    assert_close(ledger.mean()[0], matrix[:, : M * N].sum(0).view(M, N))
    assert_close(ledger.mean()[1], matrix[:, M * N :].sum(0) + other.sum(0))


def test_a_parameter_without_contributions_has_zeros_where_an_order_is_asked_for():
    parameter, layers, tensor = weight()
    unused = nn.Parameter(double(2, 2))
    ledger = Contributions(B)
    ledger.add_vectors([parameter], layers)
    ledger.close(lambda parameter, factors: sum_uses(factors))
    ledger.arrange([unused, parameter])
    zeros, found = ledger.mean()
    assert torch.equal(zeros, torch.zeros(2, 2, dtype=torch.float64))
    assert_close(found, tensor.sum(0))


def test_a_released_ledger_gives_one_combination_and_then_says_that_it_is_used_up():
    parameter, layers, tensor = weight()
    ledger = Contributions(B)
    ledger.add_vectors([parameter], layers)
    ledger.close(lambda parameter, factors: sum_uses(factors))
    (mean,) = ledger.release().mean()
    assert_close(mean, tensor.sum(0))
    with pytest.raises(RuntimeError, match="before release"):
        ledger.combine(double(B))


def filled(batch_size, dtype=torch.float32):
    """A closed ledger of vectors, a tensor and a factor."""
    x, e = torch.randn(batch_size, 7, N).to(dtype), torch.randn(batch_size, 7, M).to(dtype)
    parts = [nn.Parameter(torch.zeros(M, N, dtype=dtype)) for _ in range(3)]
    ledger = Contributions(batch_size)
    ledger.add_vectors(parts[:1], VectorLayers([x[:, 0]], [e[:, 0]], [False]))
    ledger.add_tensor(parts[1:2], torch.randn(batch_size, M, N).to(dtype))
    ledger.add_factor(parts[2], Outer(x, e, parts[2].shape))
    ledger.close(lambda parameter, factors: sum_uses(factors))
    return ledger


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_moments_and_mean_of_one_read_are_those_of_two(batch_size, dtype):
    ledger = filled(batch_size, dtype)
    moments, mean = ledger.moments_and_mean()
    for found, wanted in zip(mean, ledger.mean(), strict=True):
        assert torch.equal(found, wanted)
    squared, *others = zip(moments, ledger.moments(), strict=True)
    assert_close(*squared, dtype)  # the norm of a mean that was rounded to its dtype
    assert all(torch.equal(found, wanted) for found, wanted in others)


@pytest.mark.parametrize(("batch_size", "dtype"), [(5, torch.float32), (4, torch.float16)])
def test_there_is_no_mean_of_one_read_where_it_would_have_other_bits(batch_size, dtype):
    assert filled(batch_size, dtype).moments_and_mean() is None
