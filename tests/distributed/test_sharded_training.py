"""Trainings of models that are sharded over processes."""

import pytest
import torch
from distributed_cases import UNEVEN
from distributing import after_training_in_one, in_one
from oracle import assert_close, flat
from sharding import after_training, habits_of_trainers, messages_of

import rgd_ext


@pytest.mark.parametrize("restarts", [False, True], ids=["at once", "from a checkpoint"])
@pytest.mark.parametrize("options", [{}, {"epsilon": rgd_ext.Spectral(0.9, every=3)}], ids=["Spectral", "sometimes"])
def test_a_training_is_that_of_one_process(options, restarts, processes):
    first, second = processes.run(2, after_training, options, 0.9, restarts)
    assert all(map(torch.equal, first, second))
    assert_close(flat(first), flat(after_training_in_one(2, options, 0.9)))


def test_evaluations_second_backwards_and_assigned_states_keep_the_direction(processes):
    expected = in_one("MLP", UNEVEN[2], {})
    for found in processes.run(2, habits_of_trainers, UNEVEN[2]):
        for outcome in found.values():
            assert_close(flat(outcome.grads), flat(expected.grads))


# Elements of a gradient of the MLP; with the padding of its shards; and of its largest group.
NUMBERS, WITH_PADDING, LARGEST_GROUP = 155, 164, 72
MESSAGES = {
    "exact": ({"epsilon": rgd_ext.Rayleigh(0.5)}, {"the mean gradient": NUMBERS, "the direction": WITH_PADDING}),
    "local": ({"mode": "local"}, {"the directions": WITH_PADDING}),
    "observed": ({"observe": True}, {"the mean gradient": NUMBERS}),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_vectors_are_exchanged_group_by_group(name, processes):
    options, expected = MESSAGES[name]
    for sent, most in processes.run(2, messages_of, options):
        assert sent == expected
        assert most <= LARGEST_GROUP
