"""Groups of all kinds: wrappers with a group of their own, meshes, groups for GPUs only, and what is no group."""

import numpy as np
import pytest
import torch
from distributed_cases import UNEVEN
from distributing import (
    MANY,
    captures_of_bad_groups,
    in_each_wrapped,
    in_one,
    on_mesh,
    warnings_of_captures,
    with_group_of_hosts,
    with_many_samples,
    wrapped_with_buffers,
)
from faults import leaves_nothing
from oracle import assert_close, flat

import rgd_ext


@pytest.mark.parametrize("name", ["MLP", "large"])
@pytest.mark.parametrize("run", [in_each_wrapped, with_group_of_hosts, on_mesh], ids=lambda run: run.__name__)
def test_the_direction_is_that_of_one_process(run, name, processes):
    # All processes make groups together: from torch 2.14 on, those of some would change the names of later ones.
    size = 2 if run is in_each_wrapped else 4
    more = [3] if run is in_each_wrapped else []
    first, *others = processes.run(size, run, name, UNEVEN[size], *more)
    assert_close(flat(first.grads), flat(in_one(name, UNEVEN[size], {}).grads))
    for other in others:
        assert all(map(torch.equal, first.grads, other.grads))


@pytest.mark.parametrize("options", [{"epsilon": rgd_ext.Trace(2.0), "inverse": "exact"}, {"weights": "Gramian"}])
def test_a_gramian_that_is_too_large_is_refused(options, processes):
    if "weights" in options:
        options = {"weights": rgd_ext.weights.FromGramian(torch.diagonal)}
    for message, outcome in processes.run(2, with_many_samples, options):
        assert message.startswith("the Gramian of the 5000 samples of 2 processes is too large")
        assert leaves_nothing(outcome)


@pytest.mark.parametrize("rule", [rgd_ext.weights.Clip(0.5), rgd_ext.weights.Normalise()])
def test_rules_that_read_norms_of_samples_do_without_the_gramian(rule, processes):
    expected = in_one("MLP", MANY, {"weights": rule})
    for message, outcome in processes.run(2, with_many_samples, {"weights": rule}):
        assert message is None
        assert_close(flat(outcome.grads), flat(expected.grads))
        np.testing.assert_allclose(outcome.stats["sample_norms"], expected.stats["sample_norms"], rtol=1e-9)


def test_what_is_no_group_of_this_process_is_refused(processes):
    for errors in processes.run(4, captures_of_bad_groups):
        assert errors["string"][0] == errors["number"][0] == "TypeError"
        assert "pass a torch.distributed.ProcessGroup" in errors["string"][1]
        assert errors["mesh"][0] == errors["outside"][0] == "ValueError"
        assert "mesh of 2 dimensions, ('a', 'b')" in errors["mesh"][1]


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_the_wrapper_exchanges_nothing_itself(broadcast_buffers, processes):
    (buffers, parameters), (other_buffers, other_parameters) = processes.run(2, wrapped_with_buffers, broadcast_buffers)
    assert all(map(torch.equal, parameters, other_parameters))
    assert all(map(torch.equal, buffers, other_buffers)) == broadcast_buffers


def test_a_capture_without_a_group_warns_where_there_are_several_processes(processes):
    for (without, *_), with_group in processes.run(2, warnings_of_captures):
        assert "torch.distributed has 4 processes, and process_group is None" in without
        assert not with_group
