import importlib.util
import os
import sys

import pytest
import torch
from models import mlp

import rgd_ext

# Convolutions on a GPU: exact enough for the tests, and the same bits run to run.
torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True


if importlib.util.find_spec("expecttest") is None:
    torch.library.opcheck = lambda *_, **__: pytest.skip("torch.library.opcheck needs expecttest")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """The user's own measured rates stay out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logfinish(nodeid):
    """End a worker whose device has failed for good, after its last report: xdist starts another one."""
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as problem:
        print(f"{nodeid}: the device failed: {problem}", file=sys.__stderr__, flush=True)
        os._exit(1)


@pytest.fixture
def model():
    """A small MLP in float64."""
    return mlp().double()


@pytest.fixture
def handle(model):
    """The handle of `model`, which is captured."""
    with rgd_ext.precondition(model) as handle:
        yield handle


@pytest.fixture
def one_thread():
    """For tests whose tensors are too small for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
