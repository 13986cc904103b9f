"""The architectures of Table 1: their weights, their forward, and their capture against the oracle."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext
from bench import table1
from bench.__main__ import main
from bench.training.architectures import (
    ARCHITECTURES,
    Architecture,
    Residual,
    WideResidual,
    densenet,
    group_norm,
    resnet,
    wide_resnet,
)

SMALL = {
    "ResNet-8": partial(resnet, 8),
    "Wide ResNet-10-1": partial(wide_resnet, 10, 1),
    "DenseNet-10 (k = 4)": partial(densenet, 10, 4),
}


def resnet_weights(depth):
    count = (depth - 2) // 6
    first = (9 * 3 * 16 + 32) + 2 * count * (9 * 16 * 16 + 32)
    later = sum(9 * (c // 2) * c + 2 * c + (2 * count - 1) * (9 * c * c + 2 * c) for c in (32, 64))
    return first + later + 650


def wide_resnet_weights(depth, width):
    total, channels = 9 * 3 * 16, 16
    for out in (16 * width, 32 * width, 64 * width):
        total += 2 * channels + 9 * channels * out + 2 * out + 9 * out * out + channels * out
        total += ((depth - 4) // 6 - 1) * 2 * (2 * out + 9 * out * out)
        channels = out
    return total + 2 * channels + 10 * channels + 10


def densenet_weights(depth, growth):
    count = (depth - 4) // 3
    inputs = [16 + i * growth for i in range(3 * count + 1)]
    layers = sum(2 * c + 9 * c * growth for c in inputs[:-1])
    transitions = sum(2 * c + c * c for c in (inputs[count], inputs[2 * count]))
    return 9 * 3 * 16 + layers + transitions + 2 * inputs[-1] + 10 * inputs[-1] + 10


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm], ids=["batch norm", "group norm"])
@pytest.mark.parametrize(
    ("name", "closed_form"),
    [
        ("ResNet-110", resnet_weights(110)),
        ("Wide ResNet-16-8", wide_resnet_weights(16, 8)),
        ("DenseNet-40 (k = 12)", densenet_weights(40, 12)),
        ("DenseNet-100 (k = 24)", densenet_weights(100, 24)),
    ],
)
def test_weights_are_those_of_the_closed_form_whatever_the_normalisation(name, closed_form, norm):
    architecture = ARCHITECTURES[name]
    assert table1.count(partial(architecture.build, norm=norm)) == architecture.weights == closed_form


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_images_become_logits(name):
    with torch.device("meta"):
        assert ARCHITECTURES[name].build()(torch.empty(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_three_stages_halve_the_image_twice(name):
    with torch.device("meta"):
        features = ARCHITECTURES[name].build()[:-3](torch.empty(2, 3, 32, 32))
    assert features.shape[2:] == (8, 8)


def test_residual_blocks_without_their_branch_are_the_shortcut():
    x = torch.rand(2, 8, 4, 4)
    block, same = Residual(8, 16, 2, group_norm), WideResidual(8, 8, 1, group_norm)
    nn.init.zeros_(block.norm2.weight)
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(block(x), torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 8, 2, 2)], 1))
    assert torch.equal(same(x), x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm], ids=["batch norm", "group norm"])
@pytest.mark.parametrize("name", SMALL)
def test_every_weight_of_a_small_version_takes_part(name, norm):
    model = SMALL[name](classes=4, norm=norm)
    output = model(torch.randn(2, 3, 32, 32))
    output.square().sum().backward()
    assert output.shape == (2, 4)
    assert all(p.grad.count_nonzero() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_direction_of_a_small_version_matches_the_oracle(name):
    def loss(output):
        return F.cross_entropy(output, torch.arange(3))

    model, x = SMALL[name](norm=group_norm).double(), torch.randn(3, 3, 8, 8)
    expected = weak_field(per_sample_gradients(model, loss, [x]))
    with rgd_ext.precondition(model):
        loss(model(x.double())).backward()
    assert_close(flat_grad(model), expected)


@pytest.mark.parametrize(
    ("build", "depth", "rule"),
    [(resnet, 111, "2 plus .* of 6"), (wide_resnet, 4, "4 plus .* of 6"), (densenet, 41, "4 plus .* of 3")],
)
def test_depth_that_does_not_divide_into_stages_is_refused(build, depth, rule):
    with pytest.raises(ValueError, match=f"depth is {depth}: pass {rule}"):
        build(depth)


def test_table_prints_exact_numbers_beside_the_papers(capsys):
    assert table1.run() == []
    printed = capsys.readouterr().out
    for number in ("1,727,962", "1.7 M", "27,249,082", "27.2 M", "60,000", "59,999", "604,388", "630,420", "600 K"):
        assert number in printed


def test_count_that_differs_is_a_failure(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "table1"])
    monkeypatch.setitem(ARCHITECTURES, "ResNet-110", Architecture(resnet, 1_700_000, "1.7 M"))
    with pytest.raises(SystemExit, match="ResNet-110 has 1,727,962 weights, not 1,700,000"):
        main()


def test_rank_bound_is_below_the_number_of_weights_for_every_pair():
    largest = max(data.size for data in table1.DATA.values())
    assert all(largest - 1 < architecture.weights for architecture in ARCHITECTURES.values())
