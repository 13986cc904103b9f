import pytest
import torch
from processes import TIMEOUT, Processes

if not torch.distributed.is_available():
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Four processes, the first two of which have a group of their own."""
    found = Processes(4, [(0, 1)], TIMEOUT, tmp_path_factory.mktemp("processes"))
    yield found
    found.end()
