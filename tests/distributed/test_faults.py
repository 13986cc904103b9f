"""When one process fails or does something else, all others end with an error, and none has other weights."""

import re

import pytest
import torch
from faults import (
    CAPTURES,
    PATIENCE,
    differing_captures,
    leaves_nothing,
    with_changed_parameter,
    with_death,
    with_error_in_loss,
    with_skipped_backward,
)
from processes import TIMEOUT, Processes

from rgd_ext.distributed.exchange import compared_place


@pytest.mark.parametrize(
    ("where", "is_sharded"), [("forward", False), ("backward", False), ("policy", False), ("policy", True)]
)
def test_others_end_when_a_process_dies(where, is_sharded, tmp_path):
    processes = Processes(3, [], TIMEOUT, tmp_path)
    try:
        *others, last = processes.outcomes(range(3), with_death, where, is_sharded)
    finally:
        processes.end()
    assert isinstance(last, EOFError)
    for message, is_same, has_no_gradient in others:
        assert "of the group failed in the process of rank" in message
        assert is_same
        assert has_no_gradient


def test_an_error_in_a_loss_ends_the_others_within_the_timeout(processes):
    (seconds, message, outcome), _ = processes.run(2, with_error_in_loss)
    assert PATIENCE - 2 < seconds < PATIENCE + 10
    assert "has not come to the same call within the timeout of the group" in message
    assert leaves_nothing(outcome)


@pytest.mark.parametrize("zeroes", [True, False], ids=["no step", "old gradients"])
def test_a_process_that_skips_a_backward(zeroes, processes):
    (message, first), (of_second, second) = processes.run(2, with_skipped_backward, zeroes)
    if zeroes:  # it has made the same steps, one fewer
        assert "within the timeout" in message
        assert of_second is None
        assert all(map(torch.equal, first, second))
    else:
        assert message == of_second
        assert "the value of parameter" in message


# The entries that differ, of lists.
ENTRIES = {
    "the parameters": r"\(\('weight', \(4, 6\), [^()]+\) and \('weight', \(3, 6\), [^()]+\)\): capture",
    "the parameters, one more": r"\(\('1.weight', \(6, 6\), [^()]+\) and nothing more\): capture",
    "the modules": r"\(\('1', '[^']+ReLU'\) and \('1', '[^']+Tanh'\)\): capture",
}


@pytest.mark.parametrize("name", CAPTURES)
def test_captures_that_differ_are_refused_everywhere(name, processes):
    for message, is_untouched in processes.run(2, differing_captures, name):
        assert message.startswith(f"{name.partition(',')[0]} of rank 1 and of rank 0 differ")
        assert re.search(ENTRIES.get(name, r"\(.+ and .+\)"), message)
        assert is_untouched


@pytest.mark.parametrize("is_cpu", [True, False])
def test_every_parameter_is_compared_in_its_turn(is_cpu):
    for parameters in (1, 4, 100, 148):
        every = 1 if is_cpu else 100
        places = [compared_place(number, parameters, is_cpu) for number in range(every * parameters)]
        assert [place for place in places if place is not None] == list(range(parameters))
    assert compared_place(100, 0, is_cpu) is None


def test_a_parameter_that_has_changed_in_one_process_is_found(processes):
    first, second = processes.run(2, with_changed_parameter)
    assert first[:2] == second[:2]
    assert "the value of parameter '2.bias' of rank 1 differs from that of rank 0" in first[1]
    assert leaves_nothing(first[2])
