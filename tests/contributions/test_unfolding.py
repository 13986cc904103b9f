"""Gradients of convolutions from unfolded inputs, as on a GPU; here on the CPU, and on CUDA tensors without numbers."""

import pytest
import torch
from capturing import loss_of, without_small_layers
from operator_cases import CONVOLUTIONS, DEVICES, sample_convolution, weight_grads_by_autograd
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from planning_cases import Largest, Shapes
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rgd_ext
from rgd_ext import convolutions
from rgd_ext.contributions.convolution import Convolution
from rgd_ext.contributions.cost import Rates
from rgd_ext.convolutions import Geometry
from rgd_ext.planning.planner import Choice

WAYS = ["materialise", "recompute", "ghost"]


def by_unfolding(output_grad, x, *geometry):
    geometry = Geometry(*geometry)
    shape = *output_grad.shape[:2], x.shape[1] // geometry.groups, *geometry.kernel
    out = x.new_full(shape, torch.nan)
    convolutions.conv_weight_grads_by_unfolding(output_grad, x, geometry, out)
    return out


# All at once, some samples at a time, and one channel of one sample.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nbytes", [1 << 26, 5_000, 1])
@pytest.mark.parametrize("fewer_places", [0, 1])
@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if name != "2-d, one place"])
def test_products_with_unfolded_inputs_are_each_samples_own_gradients(name, fewer_places, nbytes, device, monkeypatch):
    monkeypatch.setattr(convolutions, "UNFOLDED_BYTES", nbytes)
    arguments = sample_convolution(name, torch.float64, device, fewer_places=fewer_places)
    assert_close(by_unfolding(*arguments).cpu(), weight_grads_by_autograd(*arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["1-d", "2-d, one place", "2-d, groups", "3-d"])
def test_products_with_unfolded_inputs_in_half_precision(name, dtype, device):
    arguments = sample_convolution(name, dtype, device)
    assert_close(by_unfolding(*arguments).cpu(), weight_grads_by_autograd(*arguments), dtype)


@pytest.mark.parametrize("layout", ["row slices", "every other row", "permuted", "expanded"])
@pytest.mark.parametrize("name", ["1-d", "2-d, 1 x 1", "2-d, groups", "3-d"])
def test_products_with_unfolded_inputs_of_any_layout(name, layout):
    arguments = sample_convolution(name, torch.float64, layout=layout)
    assert_close(by_unfolding(*arguments), weight_grads_by_autograd(*arguments))


def test_products_with_unfolded_inputs_channels_last():
    output_grad, x, *geometry = sample_convolution("2-d, uneven", torch.float64)
    arguments = *(t.contiguous(memory_format=torch.channels_last) for t in (output_grad, x)), *geometry
    assert_close(by_unfolding(*arguments), weight_grads_by_autograd(*arguments))


def test_unfolding_takes_bounded_memory():
    # Unfolded, the images of 8 samples take 128 MiB, and those of one 16.
    x, output_grad = torch.randn(8, 64, 80, 92), torch.randn(8, 4, 80, 92)
    with Largest() as largest:
        by_unfolding(output_grad, x, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    assert 4 * largest.elements <= convolutions.UNFOLDED_BYTES


def rates(product, convolution):
    return lambda device, dtype: Rates(product, convolution, 1e13, 1e12, 1e5)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Chooses how gradients of convolutions are formed, in blocks of a few elements, and one way for all layers."""

    def set_up(way, unfolds):
        without_small_layers(monkeypatch)
        monkeypatch.setattr(Convolution, "_is_native", False)
        monkeypatch.setattr("rgd_ext.contributions.convolution.rates", rates(1e13, 1e9 if unfolds else 1e16))
        monkeypatch.setattr(convolutions, "UNFOLDED_BYTES", 2_000)
        for module in (
            "rgd_ext.convolutions",
            "rgd_ext.contributions.blockwise",
            "rgd_ext.contributions.outer",
            "rgd_ext.contributions.convolution",
        ):
            monkeypatch.setattr(f"{module}.block_elements", lambda device: 200)
        choose = Choice.choose
        monkeypatch.setattr(
            Choice, "choose", lambda self, best, why: choose(self, way if way in self.strategies else best, why)
        )

    return set_up


class Volumes(nn.Module):
    """Convolutions in one and three dimensions, one of them transposed."""

    def __init__(self):
        super().__init__()
        self.volume = nn.Conv3d(2, 3, (2, 3, 2), (1, 2, 1), (1, 1, 0))
        self.up = nn.ConvTranspose1d(3, 4, 3, 2, 1, output_padding=1)
        self.line = nn.Conv1d(4, 5, 3, dilation=2, padding="same", padding_mode="circular")

    def forward(self, x):
        return self.line(self.up(self.volume(x).tanh().flatten(2)).tanh())


NETWORKS = {"planes": (Shapes, (6, 3, 8, 8)), "volumes": (Volumes, (5, 2, 3, 5, 3))}


@pytest.mark.parametrize("unfolds", [True, False])
@pytest.mark.parametrize("policy", [rgd_ext.Spectral(0.5), rgd_ext.Rayleigh(0.5)], ids=["Spectral", "Rayleigh"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_of_a_gpu_gives_the_direction_of_the_oracle(name, way, policy, unfolds, as_on_a_gpu):
    as_on_a_gpu(way, unfolds)
    build, shape = NETWORKS[name]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    with rgd_ext.precondition(model, epsilon=policy) as handle:
        loss_of(model(x)).backward()
        assert way in {layer.way for layer in handle.plan().layers}
    grads = per_sample_gradients(model, loss_of, [x])
    assert_close(flat_grad(model), weak_field(grads, type(policy).__name__))


@pytest.mark.parametrize("way", WAYS)
def test_unfolding_under_autocast_with_channels_last(way, as_on_a_gpu):
    as_on_a_gpu(way, unfolds=True)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 5, 3, 2))
    model, x = model.to(memory_format=torch.channels_last), torch.randn(6, 4, 7, 9)
    with rgd_ext.precondition(model, epsilon=rgd_ext.Trace(0.5)), torch.autocast("cpu", torch.bfloat16):
        loss_of(model(x.contiguous(memory_format=torch.channels_last))).backward()
    wanted = weak_field(per_sample_gradients(model, loss_of, [x]), "Trace")
    assert_close(flat_grad(model), wanted, torch.bfloat16)


class Operators(TorchDispatchMode):
    """How many operators run that launch something on a GPU."""

    number = 0

    IDLE = ("aten::new_empty", "aten::_unsafe_view", "prim::device")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not func.is_view and func.name() not in self.IDLE
        return func(*args, **(kwargs or {}))


GEOMETRY = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)


def on_cuda(batch_size, places=16, m=32, n=64):
    return Convolution(
        torch.empty(batch_size, m, places, places, device="cuda"),
        torch.empty(batch_size, n, places, places, device="cuda"),
        torch.Size((m, n, 3, 3)),
        GEOMETRY,
    )


def operators_on_cuda(way, batch_size):
    with FakeTensorMode():
        factor = on_cuda(batch_size)
        with Operators() as operators:
            settled = factor.apply(way, lambda shape, like: like.new_empty(shape))
            if way == "recompute":
                settled.gram(), settled.moments()
    return operators.number


@pytest.mark.parametrize("way", WAYS)
def test_as_many_operators_for_any_batch_that_fits(way, monkeypatch):
    monkeypatch.setattr("rgd_ext.contributions.convolution.rates", rates(1e13, 1e9))
    few, many = (operators_on_cuda(way, batch_size) for batch_size in (2, 100))
    assert few == many
    # Padding, copy and product, and with recompute the statistics; each twice.
    assert few == {"materialise": 3, "recompute": 8, "ghost": 2}[way]
    # 576 KiB a sample: 113 fit at a time.
    assert operators_on_cuda("materialise", 1_000) == 3 * 9


@pytest.mark.parametrize("unfolds", [True, False])
def test_gradients_are_formed_by_what_is_measured_to_be_faster(unfolds, monkeypatch):
    monkeypatch.setattr("rgd_ext.contributions.convolution.rates", rates(1e13, 1e9 if unfolds else 1e16))
    with FakeTensorMode():
        factor = on_cuda(64)
        cost = factor.strategies(True)["materialise"]
        with Largest() as largest:
            factor.dense()
    assert factor._unfolds == unfolds
    assert bool(cost.product) == unfolds
    assert bool(cost.convolution) != unfolds
    assert largest.elements >= 64 * 576 * 256 if unfolds else largest.elements < 64 * 576 * 256
    # The sum over all samples is an ordinary gradient in either case.
    assert factor.plain().convolution == 0


def test_the_cpu_keeps_its_kernel(monkeypatch):
    monkeypatch.setattr("rgd_ext.contributions.convolution.rates", rates(1e18, 1))
    output_grad, x = torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6)
    factor = Convolution(output_grad, x, torch.Size((8, 8, 3, 3)), GEOMETRY)
    with Largest() as largest:
        factor.dense()
    assert largest.elements == 4 * 8 * 8 * 9
    assert factor.strategies(True)["materialise"].product == 0
