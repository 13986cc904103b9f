"""`rgd_ext.convert_batch_norm` replaces batch by group normalisation of the same scale and shift."""

import copy

import pytest
import torch
from torch import nn

import rgd_ext


def network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Sequential(nn.Conv2d(6, 64, 3), nn.BatchNorm2d(64))
    )


def test_every_batch_norm_becomes_a_group_norm_with_its_scale_and_shift():
    model = network()
    nn.init.uniform_(model[1].weight)
    before = copy.deepcopy(model.state_dict())
    converted = rgd_ext.convert_batch_norm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    assert torch.equal(converted[1].weight, model[1].weight)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    rgd_ext.precondition(converted)
    assert converted(torch.randn(2, 3, 8, 8)).shape == (2, 64, 4, 4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 31, 32, 48, 64, 100])
def test_groups_divide_the_channels_and_never_hold_a_single_one(channels):
    norm = rgd_ext.convert_batch_norm(nn.BatchNorm1d(channels))
    assert channels % norm.num_groups == 0
    assert norm.num_groups < channels or channels == 1
    if channels > 1:
        assert norm(torch.randn(4, channels)).abs().sum() > 0


def test_mode_precision_and_frozen_parameters_are_kept():
    layer = nn.BatchNorm2d(8).double().eval()
    layer.weight.requires_grad_(False)
    norm = rgd_ext.convert_batch_norm(layer)
    assert norm.weight.dtype == torch.float64
    assert not norm.training
    assert not norm.weight.requires_grad
    assert norm.bias.requires_grad
    assert rgd_ext.convert_batch_norm(nn.BatchNorm2d(8, affine=False)).weight is None


def test_bad_input_is_refused_by_its_value():
    with pytest.raises(TypeError, match="int"):
        rgd_ext.convert_batch_norm(3)
    with pytest.raises(ValueError, match="num_groups is 0"):
        rgd_ext.convert_batch_norm(network(), 0)


class Rectified(nn.BatchNorm2d):
    """As timm's BatchNormAct2d, it does more than normalise."""

    def forward(self, x):
        return super().forward(x).relu()


class Renamed(nn.BatchNorm2d):
    """Another name for the same."""


def test_a_batch_norm_that_does_more_is_refused_by_its_name():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(Rectified(6)))
    with pytest.raises(ValueError, match=r"module '1\.0' \(Rectified\) has a forward of its own.*\.eval\(\)"):
        rgd_ext.convert_batch_norm(model)
    model[1][0].eval()
    assert rgd_ext.verify(model.double(), torch.randn(4, 3, 8, 8).double())


def test_a_batch_norm_under_another_name_is_replaced():
    assert type(rgd_ext.convert_batch_norm(Renamed(6))) is nn.GroupNorm
    assert type(rgd_ext.convert_batch_norm(nn.SyncBatchNorm(6))) is nn.GroupNorm


def test_a_batch_norm_at_two_places_stays_one():
    norm = nn.BatchNorm2d(6)
    converted = rgd_ext.convert_batch_norm(nn.Sequential(norm, nn.Sequential(nn.ReLU(), norm), norm))
    assert type(converted[0]) is nn.GroupNorm
    assert converted[0] is converted[1][1] is converted[2]


def rectify(module, inputs, output):
    return output.relu()


def test_what_is_attached_to_a_batch_norm_is_not_left_out():
    hooked, changed = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    hooked.register_forward_hook(rectify)
    changed.forward = nn.ReLU().forward
    with pytest.raises(ValueError, match=r"'0' \(BatchNorm2d\) has forward hooks"):
        rgd_ext.convert_batch_norm(nn.Sequential(hooked))
    with pytest.raises(ValueError, match=r"'0' \(BatchNorm2d\) has a forward of its own"):
        rgd_ext.convert_batch_norm(nn.Sequential(changed))
