"""Models and steps that are not alike in all processes: exact, or an error in all of them."""

import numpy as np
import pytest
import torch
from irregular import (
    SIZES,
    assigned,
    build_in_one,
    chained,
    outcome_of_build,
    record_of_nothing,
    returning_a_dataclass,
    twins,
    with_caches,
    with_frozen_that_changed,
    with_scales_that_differ,
    with_vector_in_one,
    without_contributions,
)
from models import mlp
from oracle import assert_close, flat
from torch import distributed, nn

import rgd_ext
from rgd_ext.distributed.agreement import checksum


def test_buffers_of_a_batch_stay_with_their_process(processes):
    (grads, sizes), (others, other_sizes) = processes.run(2, with_caches)
    assert all(map(torch.equal, grads, others))
    assert [sizes, other_sizes] == [[size, size] for size in SIZES]


@pytest.mark.parametrize("is_called", [True, False], ids=["empty call", "empty block"])
def test_parameters_that_were_replaced_and_frozen_before_a_batch_without_samples(is_called, processes):
    first, second = processes.run(2, assigned, is_called)
    assert all(map(torch.equal, first, second))


def test_backwards_of_equal_models_in_another_order_are_refused(processes):
    for message in processes.run(2, twins):
        assert "the captured model whose backward runs of rank 1 differs from that of rank 0" in message


@pytest.mark.parametrize("is_empty", [False, True])
def test_models_in_one_backward_need_groups_of_their_own(is_empty, processes):
    first, second = processes.run(2, chained, is_empty, True)
    assert all(map(torch.equal, first, second))
    for message in processes.run(2, chained, False, False):
        assert "two captured models with the same process_group" in message


def test_a_dataclass_without_samples(processes):
    first, second = processes.run(2, returning_a_dataclass)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "options", [{}, {"epsilon": rgd_ext.Spectral(3.0), "inverse": "exact"}, {"weights": rgd_ext.weights.Clip(0.1)}]
)
@pytest.mark.parametrize(("name", "dtype"), [("scalar", torch.float64), ("two dtypes", torch.float32)])
def test_scalars_and_dtypes(name, dtype, options, processes):
    first, second = processes.run(2, outcome_of_build, name, options)
    assert all(map(torch.equal, first.grads, second.grads))
    assert_close(flat(g.double() for g in first.grads), flat(build_in_one(name, options).grads), dtype)


def test_a_policy_that_differs_between_processes_is_that_of_the_first(processes):
    first, second = processes.run(2, with_scales_that_differ)
    assert first == second
    assert first[0] == pytest.approx(0.1 / SIZES[0] ** 2)


def test_a_frozen_parameter_that_has_changed_in_one_process_is_found(processes):
    for message in processes.run(2, with_frozen_that_changed):
        assert "the value of parameter '0.weight' of rank 1 differs" in message


def test_products_that_one_process_alone_wants_are_refused(processes):
    for message in processes.run(2, with_vector_in_one):
        assert "the vectors of handle.align) of rank 1 differs" in message


def test_a_process_without_contributions_has_no_samples(processes):
    assert processes.run(2, without_contributions) == [SIZES[0]] * 2


def test_a_process_without_samples_records_none(processes, tmp_path):
    path = tmp_path / "record.npy"
    assert processes.run(2, record_of_nothing, str(path)) == [slice(0, 2), slice(2, 2)]
    assert list(np.load(path)["batch_size"]) == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_checksums_tell_tensors_apart(dtype):
    x = torch.randn(5000).to(dtype) if dtype.is_floating_point else torch.randint(2, (5000,)).to(dtype)
    x[0], x[-1] = 1, 0
    changed = x.clone()
    changed[4999] += 1
    others = [x.flip(0), x.roll(1), changed, *([-x] if dtype.is_floating_point else [])]
    assert checksum(x) == checksum(x.clone()) == checksum(x.expand(2, -1)[0])
    assert all(checksum(x) != checksum(other) for other in others)
    assert checksum(x[::5000]) == checksum(x[:1])  # of one element, with a stride


@pytest.mark.parametrize(
    ("buffer", "problem"),
    [
        (torch.ones(1).expand(3), "is expanded"),
        (torch.ones(3, device="meta"), "is on the meta device"),
        (torch.eye(3).to_sparse(), "has the layout torch.sparse_coo"),
        (torch.ones(3, dtype=torch.complex64).conj(), "is a lazy conjugate"),
    ],
)
def test_tensors_that_cannot_be_overwritten_are_refused(buffer, problem):
    model = nn.Sequential(mlp())
    model.register_buffer("table", buffer)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=f"'table' {problem}.*replace it by a copy"):
            rgd_ext.precondition(model, process_group=distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()
