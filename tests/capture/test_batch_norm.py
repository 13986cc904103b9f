"""Batch normalisation is refused in training mode, unless its contributions are asked for."""

import pytest
import torch
import torch.nn.functional as F
from capturing import Gain, assert_exact, captured_grad, double, loss_of
from models import Net
from oracle import assert_close, direction
from torch import nn

import rgd_ext


class PerSampleBatchNorm(nn.Module):
    """Batch normalisation with one scale and shift per sample: what a contribution is the derivative of."""

    def __init__(self, weight, bias, batch):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().expand(batch, -1).clone())
        self.bias = nn.Parameter(bias.detach().expand(batch, -1).clone())

    def forward(self, x):
        return F.batch_norm(x, None, None, training=True) * self.weight[..., None] + self.bias[..., None]


def test_batch_norm_contributions_sum_to_the_gradient_and_are_exact():
    model, x = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()).double(), double(5, 4, 3)
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 1.5)
        model[0].bias.uniform_(-1, 1)
    spread = nn.Sequential(PerSampleBatchNorm(model[0].weight, model[0].bias, 5), nn.Tanh())
    loss_of(spread(x)).backward()
    rows = torch.cat([spread[0].weight.grad, spread[0].bias.grad], 1) * 5
    assert_close(captured_grad(model, x, batch_norm="contribution"), direction(rows))


def test_batch_norm_in_training_mode_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\).*eval.*convert_batch_norm.*contribution"):
        rgd_ext.precondition(model)
    assert all("forward" not in m.__dict__ for m in model.modules())
    model.eval()
    with rgd_ext.precondition(model):
        model.train()
        with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\)"):
            model(torch.randn(3, 1, 5, 5))


def test_batch_norm_inside_a_unit_is_refused_whatever_the_mode():
    class Block(Gain):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4, affine=False)

        def forward(self, x):
            return super().forward(self.norm(x))

    with pytest.raises(ValueError, match=r"one sample|sample by sample"):
        captured_grad(Block(), torch.randn(6, 4), batch_norm="contribution")


class Rectified(nn.BatchNorm1d):
    """As timm's BatchNormAct2d, it does more than normalise."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("options", [{}, {"batch_norm": "contribution"}])
def test_a_batch_norm_with_a_forward_of_its_own_is_refused_with_remedies_that_work(options):
    model, x = nn.Sequential(nn.Linear(4, 4), Rectified(4)).double(), double(5, 4)
    with pytest.raises(ValueError, match=r"'1' \(Rectified\).*\.eval\(\) on it.*nn\.Sequential") as refusal:
        captured_grad(model, x, **options)
    assert "convert_batch_norm" not in str(refusal.value)
    model[1].eval()
    assert_exact(model, x, **options)
    model[1].train()
    norm = nn.BatchNorm1d(4).double()
    norm.load_state_dict(model[1].state_dict())
    replaced = nn.Sequential(model[0], nn.Sequential(norm, nn.ReLU()))
    assert torch.equal(replaced(x), model(x))
    captured_grad(replaced, x, batch_norm="contribution")
    captured_grad(rgd_ext.convert_batch_norm(replaced), x)


def test_functional_batch_norm_of_a_container_is_refused():
    def forward(m, x):
        return F.batch_norm(m.body(x), None, None, m.p, None, training=True)

    model = Net(forward, body=nn.Linear(4, 4), p=nn.Parameter(torch.ones(4)))
    with pytest.raises(ValueError, match="couples the samples"):
        captured_grad(model, torch.randn(6, 4))
