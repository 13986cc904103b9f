"""Several processes write the direction of one process that has all their samples, with the same bits in each."""

import pytest
from distributed_cases import CASES, EVEN, UNEVEN
from distributing import in_each, in_one
from same_as_one import OPTIONS, assert_same_as_one

EMPTY = {2: (0, 5), 4: (3, 0, 2, 0)}
SINGLE = {2: (1, 0), 4: (0, 0, 1, 0)}


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN, EMPTY, SINGLE], ids=["even", "uneven", "empty", "single"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_policies_inverses_and_rules(name, size, sizes, processes):
    found = processes.run(size, in_each, "MLP", sizes[size], OPTIONS[name])
    assert_same_as_one(found, in_one("MLP", sizes[size], OPTIONS[name]))


@pytest.mark.parametrize("name", [name for name in CASES if name != "batch norm"])
def test_models(name, processes):
    found = processes.run(2, in_each, name, UNEVEN[2], {}, 2)
    assert_same_as_one(found, in_one(name, UNEVEN[2], {}))
