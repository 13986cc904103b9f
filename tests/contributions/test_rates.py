"""The rates of a device are measured once and kept in a file."""

import json
import math

import pytest
import torch
from planning_cases import Largest
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rgd_ext
from rgd_ext.contributions import rates as of_device
from rgd_ext.contributions.cost import Cost, Rates


def test_costs_are_operations_and_bytes_over_rates():
    rates = Rates(product=10, convolution=20, gram=40, stream=5, calls=2)
    one, two = Cost(product=10, stream=5, held=3), Cost(convolution=40, gram=40, calls=4, held=4)
    assert one.seconds(rates) == 2
    assert (one + two).seconds(rates) == 2 + 2 + 1 + 2
    assert (one + two).held == 7


@pytest.fixture(autouse=True)
def _forget_rates():
    yield
    of_device.rates.cache_clear()


def rates():
    """As a new process finds them."""
    of_device.rates.cache_clear()
    return of_device.rates(torch.device("cpu"), torch.float32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A file of rates of its own, and how often they are measured."""
    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(of_device, "_measured", lambda *device: measured.append(device) or Rates(1, 2, 3, 4, 5))
    return tmp_path / "rgd_ext" / "rates.json", measured


def test_rates_are_measured_once_and_kept(cache):
    path, measured = cache
    assert rates() == rates() == Rates(1, 2, 3, 4, 5)
    assert len(measured) == 1
    assert len(json.loads(path.read_text())) == 1
    assert [file.name for file in path.parent.iterdir()] == ["rates.json"]
    of_device.rates(torch.device("cpu"), torch.float64)
    assert len(measured) == 2
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[1]", '{"key": {"product": 1}}', '{"key": 3}', "not json"])
def test_a_file_that_is_not_one_of_rates_is_written_anew(cache, content):
    path, measured = cache
    path.parent.mkdir()
    path.write_text(content)
    assert rates() == rates()
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_does_no_harm(cache):
    path, measured = cache
    path.parent.write_text("a file in the place of the folder")
    assert rates() == rates()
    assert len(measured) == 2


def test_rates_are_measured_for_a_user_without_a_home(cache, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(of_device.Path, "home", homeless)
    assert rates() == Rates(1, 2, 3, 4, 5)


@pytest.mark.parametrize("change", ["version", "kernels"])
def test_rates_that_were_measured_otherwise_are_measured_again(change, cache, monkeypatch):
    _, measured = cache
    rates()
    if change == "version":
        monkeypatch.setattr(of_device, "_VERSION", of_device._VERSION + 1)
    else:
        compiled = not rgd_ext.build_info()["compiled"]
        monkeypatch.setattr(of_device, "build_info", lambda: {"compiled": compiled})
    rates()
    assert len(measured) == 2


class FakeDevice(TorchDispatchMode):
    """A device that computes nothing, in a time: calls take the host `LAUNCH` seconds, and return at once."""

    LAUNCH, WAIT = 5e-6, 1e-5

    def __init__(self, rates):
        super().__init__()
        self.rates, self.host, self.ready = rates, 0.0, 0.0

    def now(self, devices):
        self.host = max(self.host, self.ready) + self.WAIT
        return self.host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func.name().partition("::")[2]
        self.host += self.LAUNCH
        self.ready = max(self.ready, self.host) + self.work(name, args).seconds(self.rates)
        return result

    def work(self, name, args):
        if name == "mm.out":
            return Cost(product=2 * args[0].numel() * args[1].shape[1])
        if name == "conv_weight_grads":
            return Cost(convolution=2 * args[0].numel() * args[1].shape[1] * math.prod(args[2]))
        if name not in ("combine", "gram"):
            return Cost()
        (grads,) = args[0]
        return Cost(stream=grads.nbytes, gram=len(grads) * grads.numel() * (name == "gram"))


@pytest.mark.parametrize(
    ("dtype", "rates"),
    [
        (torch.float32, Rates(5e13, 2e12, 1.5e13, 3e12, 1 / FakeDevice.LAUNCH)),
        (torch.bfloat16, Rates(7e14, 5e12, 1e14, 4.3e12, 1 / FakeDevice.LAUNCH)),
    ],
    ids=str,
)
def test_measured_rates_are_those_of_a_device_that_works_while_the_host_goes_on(dtype, rates):
    with FakeDevice(rates) as device, Largest() as largest:
        found = of_device._measured(torch.device("meta"), dtype, device.now)
    assert vars(found) == pytest.approx(vars(rates), rel=0.1)
    assert device.now([]) < 0.3
    assert dtype.itemsize * largest.elements <= 256 << 20


@pytest.mark.usefixtures("cache")
def test_rates_asked_for_among_fake_tensors_are_of_real_ones(monkeypatch):
    seen = []
    monkeypatch.setattr(of_device, "_measured", lambda *_: seen.append(type(torch.ones(1))) or Rates(1, 2, 3, 4, 5))
    with FakeTensorMode():
        rates()
    assert seen == [torch.Tensor]


def test_rates_of_meta_tensors_are_not_those_of_the_cpu(cache):
    _, measured = cache
    rates()
    of_device.rates(torch.device("meta"), torch.float32)
    assert len(measured) == 2


def test_measured_rates_are_positive_numbers():
    found = of_device._measured(torch.device("cpu"), torch.float32)
    assert all(0 < rate < 1e16 for rate in vars(found).values())
