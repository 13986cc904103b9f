"""What trainings of several processes do besides single backwards: steps, micro-batches, messages during a backward."""

import pytest
import torch
from distributed_cases import UNEVEN
from distributing import (
    after_training,
    after_training_in_one,
    after_uneven_epochs,
    events_of,
    in_one,
    micro_batches,
    uses_in_one,
    uses_that_change,
)
from oracle import assert_close, flat

import rgd_ext


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", [{}, {"epsilon": rgd_ext.Spectral(0.9, every=3)}, {"epsilon": rgd_ext.Trace(0.5)}])
def test_a_training_is_that_of_one_process(options, size, processes):
    first, *others = processes.run(size, after_training, options, 0.9)
    for other in others:
        assert all(map(torch.equal, first, other))
    assert_close(flat(first), flat(after_training_in_one(size, options, 0.9)))


@pytest.mark.parametrize("collect", ["block", "deferred"])
@pytest.mark.parametrize("name", ["MLP", "GPT"])
def test_micro_batches_make_one_direction(name, collect, processes):
    for found in processes.run(2, micro_batches, name, UNEVEN[2], collect):
        expected = in_one(name, UNEVEN[2], {})
        assert_close(flat(found.grads), flat(expected.grads))
        assert found.stats["batch_size"] == sum(UNEVEN[2])


def test_parts_of_a_mean_that_come_after_it_was_sent_are_not_lost(processes):
    times = [(1, 1), (1, 3), (2, 0), (1, 1), (0, 0), (3, 1)]
    found = processes.run(2, uses_that_change, times)
    for outcomes in found:
        for outcome, expected in zip(outcomes, uses_in_one(UNEVEN[2], times), strict=True):
            pairs = zip(outcome.grads, expected.grads, strict=True)
            assert_close(*map(flat, zip(*[pair for pair in pairs if pair[0] is not None], strict=True)))
            assert [g is None for g in outcome.grads] == [g is None for g in expected.grads]


SIZE = 4 * (150 * 150 + 150)
MESSAGES = {
    "exact": ({"epsilon": rgd_ext.Rayleigh(0.5)}, 2),
    "bound": ({"epsilon": rgd_ext.Spectral(0.5, across_ranks="bound")}, 2),
    "local": ({"mode": "local"}, 1),
    "observed": ({"observe": True}, 1),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_step_exchanges_two_gradients(name, processes):
    options, number = MESSAGES[name]
    for events in processes.run(2, events_of, options):
        assert sum(event[1] for event in events if event != "backward of the first half") == number * SIZE


def test_a_part_of_the_mean_leaves_while_the_backward_runs(processes):
    for events in processes.run(2, events_of, {"epsilon": rgd_ext.Trace(0.5)}, 4 * 150 * 150):
        middle = events.index("backward of the first half")
        assert [event[0] for event in events[:middle]] == ["the mean gradient"] * 2
        assert all(event[1] == 150 * 150 for event in events[:middle])


def test_a_process_without_data_makes_the_steps_of_the_others(processes):
    (first, has_no_stats), (second, _) = processes.run(2, after_uneven_epochs)
    assert all(map(torch.equal, first, second))
    assert has_no_stats  # after a backward without any sample
