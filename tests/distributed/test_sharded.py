"""Models that are sharded over processes get the direction of one process that has them whole."""

import numpy as np
import pytest
import torch
from distributed_cases import UNEVEN
from distributing import directions_of_each, in_one, items_in_one
from oracle import assert_close, flat, relative_error
from same_as_one import OPTIONS, assert_same_as_one
from sharding import (
    in_each,
    in_each_on_mesh,
    items_of,
    micro_batches,
    replicated,
    with_norm_of_its_own,
    with_scaler,
    with_tiny_second_gradient,
    with_whole_parameters,
)

import rgd_ext


@pytest.mark.parametrize("name", OPTIONS)
def test_policies_inverses_and_rules(name, processes):
    found = processes.run(2, in_each, "MLP", "children", "float32", UNEVEN[2], OPTIONS[name])
    assert_same_as_one(found, in_one("MLP", UNEVEN[2], OPTIONS[name]))


@pytest.mark.parametrize("policy", ["float32", "kept", "resharded", "last dim"])
@pytest.mark.parametrize("way", ["root", "children", "without_root"])
def test_ways_to_shard(way, policy, processes):
    found = processes.run(2, in_each, "MLP", way, policy, UNEVEN[2], {})
    assert_same_as_one(found, in_one("MLP", UNEVEN[2], {}))


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1)])
def test_hybrid_sharding(shape, processes):
    found = processes.run(4, in_each_on_mesh, "MLP", "children", shape, UNEVEN[4], {})
    assert_same_as_one(found, in_one("MLP", UNEVEN[4], {}))


@pytest.mark.parametrize("policy", ["resharded to two", "kept"])
def test_four_processes(policy, processes):
    found = processes.run(4, in_each, "MLP", "children", policy, UNEVEN[4], {})
    assert_same_as_one(found, in_one("MLP", UNEVEN[4], {}))


def test_replicated_parameters(processes):
    pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")
    found = processes.run(2, replicated, UNEVEN[2])
    assert_same_as_one(found, in_one("MLP", UNEVEN[2], {"epsilon": rgd_ext.Rayleigh(0.5)}))


def test_layers_with_buffers_that_are_sharded_themselves(processes):
    found = processes.run(2, with_norm_of_its_own, UNEVEN[2])
    assert_same_as_one(found, in_one("batch norm", UNEVEN[2], {"batch_norm": "contribution"}))


MODELS = {"GPT": "blocks", "ViT": "blocks", "ResNet": "root", "LSTM classifier": "root"}
MODELS |= {"checkpointed": "children", "frozen": "children", "tied": "root", "two heads": "root", "large": "children"}


@pytest.mark.parametrize("name", MODELS)
def test_models(name, processes):
    found = processes.run(2, in_each, name, MODELS[name], "float32", UNEVEN[2], {})
    assert_same_as_one(found, in_one(name, UNEVEN[2], {}))


def test_parameters_that_stay_whole(processes):
    found = processes.run(2, with_whole_parameters, UNEVEN[2])
    assert_same_as_one(found, in_one("frozen", UNEVEN[2], {}))


@pytest.mark.parametrize("collect", ["block", "deferred"])
def test_micro_batches(collect, processes):
    found = processes.run(2, micro_batches, collect, UNEVEN[2])
    assert all(map(torch.equal, found[0].grads, found[1].grads))
    assert_close(flat(found[0].grads), flat(in_one("MLP", UNEVEN[2], {}).grads))


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("way", ["root", "children"])
def test_statistics_of_each_parameter_and_products_with_sharded_vectors(way, gram, processes):
    expected = items_in_one("MLP", UNEVEN[2])
    for found, aligned, vectors in processes.run(2, items_of, "MLP", way, UNEVEN[2], gram):
        for key in ("grad_norm", "trace", "noise_scale"):
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-8, atol=1e-14, err_msg=key)
        # The mean of <g_i, v> with v = g is |g|^2.
        assert_close(aligned.mean(), flat(vectors).square().sum())


def test_the_local_mode_takes_the_mean_of_the_directions_of_the_processes(processes):
    options = {"epsilon": rgd_ext.Spectral(0.8)}
    found = processes.run(2, in_each, "MLP", "children", "float32", UNEVEN[2], options | {"mode": "local"})
    assert all(map(torch.equal, found[0].grads, found[1].grads))
    assert_close(flat(found[0].grads), flat(directions_of_each("MLP", UNEVEN[2], options)))


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_infinite_gradient_in_one_process_has_all_skip_the_step(bad_rank, processes):
    assert processes.run(2, with_scaler, bad_rank) == [[False, True]] * 2


def test_mixed_precision(processes):
    options = {"epsilon": rgd_ext.Rayleigh(0.5)}
    first, second = processes.run(2, in_each, "large", "children", "bfloat16", UNEVEN[2], options, 2, torch.float32)
    assert all(map(torch.equal, first.grads, second.grads))
    assert {g.dtype for g in first.grads} == {torch.float32}
    assert relative_error(flat(first.grads), flat(in_one("large", UNEVEN[2], options).grads)) < 2e-2


def test_sums_over_processes_are_in_float32_where_modules_are_in_bfloat16(processes):
    for grad, norm in processes.run(2, with_tiny_second_gradient):
        assert torch.equal(grad, torch.full((8, 8), (1 + 2.0**-9) / 2))
        assert norm == pytest.approx((1 + 2.0**-9) / 2 * 8, rel=1e-6)
