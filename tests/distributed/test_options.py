"""Modes, precisions, records and buffers with several processes."""

import numpy as np
import pytest
import torch
from distributed_cases import UNEVEN
from distributing import (
    buffers_in_one,
    buffers_of,
    directions_of_each,
    in_each,
    in_low_precision,
    in_one,
    items_in_one,
    items_of,
    of_random_rule,
    one_process_alone,
    records_of,
    with_agreeing_samples,
    with_scaler,
)
from oracle import assert_close, diffusion_matrix, flat, relative_error

import rgd_ext

EMPTY = (0, 5)


@pytest.mark.parametrize("sizes", [UNEVEN[2], EMPTY], ids=["uneven", "empty"])
def test_the_local_mode_takes_the_mean_of_the_directions_of_the_processes(sizes, processes):
    options = {"epsilon": rgd_ext.Spectral(0.8)}
    first, second = processes.run(2, in_each, "MLP", sizes, options | {"mode": "local"})
    assert all(map(torch.equal, first.grads, second.grads))
    assert_close(flat(first.grads), flat(directions_of_each("MLP", sizes, options)))
    assert [found.stats and found.stats["batch_size"] for found in (first, second)] == [sizes[0] or None, sizes[1]]


def test_the_bound_of_the_largest_eigenvalue_is_one(processes):
    (found, *_) = processes.run(4, in_each, "MLP", UNEVEN[4], {"epsilon": rgd_ext.Spectral(0.5, across_ranks="bound")})
    exact = in_one("MLP", UNEVEN[4], {}).stats["largest_eigenvalue"]
    assert exact <= found.stats["largest_eigenvalue"] <= found.stats["trace"]
    assert found.stats["epsilon"] == pytest.approx(0.5 / found.stats["largest_eigenvalue"])


PRECISIONS = {
    "float32": (torch.float32, None, 1e-5),
    "bfloat16": (torch.bfloat16, None, 2e-2),
    "autocast": (torch.float32, torch.bfloat16, 2e-2),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_precisions(name, processes):
    dtype, autocast, tolerance = PRECISIONS[name]
    first, second = processes.run(2, in_low_precision, dtype, autocast)
    assert all(map(torch.equal, first.grads, second.grads))
    assert {g.dtype for g in first.grads} == {dtype}
    expected = in_one("large", UNEVEN[2], {"epsilon": rgd_ext.Rayleigh(0.5)})
    assert relative_error(flat(first.grads), flat(expected.grads)) < tolerance


def test_the_direction_of_samples_that_nearly_agree(processes):
    rows = 0.01 * torch.randn(100, 1) * torch.randn(60) + 30 * torch.randn(60) / 60**0.5
    mean, matrix = rows.double().mean(0), diffusion_matrix(rows.double())
    expected = mean - 0.5 / torch.linalg.eigvalsh(matrix)[-1] * matrix @ mean
    for grad in processes.run(2, with_agreeing_samples, rows.chunk(2)):
        assert relative_error(grad, expected) < 1e-5


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_infinite_gradient_in_one_process_has_all_skip_the_step(bad_rank, processes):
    assert processes.run(2, with_scaler, bad_rank) == [[False, True]] * 2


def test_weights_that_a_rule_draws_are_those_of_the_first_process(processes):
    first, *others = processes.run(4, of_random_rule)
    for other in others:
        assert all(map(torch.equal, first.grads, other.grads))
        assert np.array_equal(first.stats["weights"], other.stats["weights"])


def test_each_process_records_its_own_samples(processes, tmp_path):
    path = tmp_path / "record.npy"
    found = processes.run(4, records_of, str(path))
    assert [each.stop - each.start for each, _ in found] == list(UNEVEN[4])
    rows, (_, stats) = np.load(path), found[0]
    assert set(rows["batch_size"]) == {sum(UNEVEN[4])}
    for name in ("sample_norms", "alignments", "aligned", "weights"):
        np.testing.assert_allclose(rows[name], stats[name], rtol=1e-12)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(
    ("name", "sizes"), [("MLP", EMPTY), ("MLP", UNEVEN[2]), ("GPT", UNEVEN[2]), ("ResNet", UNEVEN[2]), ("large", EMPTY)]
)
def test_statistics_of_each_parameter(name, sizes, gram, processes):
    expected = items_in_one(name, sizes)
    for found in processes.run(2, items_of, name, sizes, gram):
        assert list(found["name"]) == list(expected["name"])
        for key in ("grad_norm", "trace", "noise_scale"):
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-8, atol=1e-14, err_msg=key)


def test_noise_scales_of_parameters_that_only_some_processes_use_are_refused(processes):
    for error in processes.outcomes(range(2), items_of, "two heads", UNEVEN[2]):
        assert isinstance(error, RuntimeError)
        assert "only some of the processes use parameter" in str(error)


@pytest.mark.parametrize("name", ["ResNet", "batch norm"])
def test_contributions_of_batch_norm(name, processes):
    options = {"batch_norm": "contribution"}
    first, second = processes.run(2, in_each, name, UNEVEN[2], options)
    assert all(map(torch.equal, first.grads, second.grads))
    assert_close(flat(first.grads), flat(in_one(name, UNEVEN[2], options).grads))


def test_buffers_are_those_of_the_first_process(processes):
    for found in processes.run(2, buffers_of):
        assert all(map(torch.equal, found, buffers_in_one()))


def test_a_process_without_data_takes_part(processes):
    first, second = processes.run(2, one_process_alone)
    assert all(map(torch.equal, first.grads, second.grads))
    assert first.stats["batch_size"] == second.stats["batch_size"] == 3
