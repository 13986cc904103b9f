"""Autocast, gradient scalers and models of low precision keep the direction, and an overflow is passed on."""

import copy

import pytest
import torch
from capturing import captured_grad, double, loss_of
from models import Net, mlp
from oracle import assert_close, flat, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext


def test_autocast_and_a_grad_scaler_keep_the_direction_and_its_dtype():
    model, x = mlp(), torch.randn(16, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = rgd_ext.RGD(model, lr=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(x))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    error = (flat_grad(model) - expected).norm() / expected.norm()
    assert error < 0.05


def test_a_fixed_epsilon_follows_the_scale_of_a_grad_scaler():
    model, x = mlp().double(), double(16, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    optimizer = rgd_ext.RGD(model, lr=0.1, epsilon=rgd_ext.Fixed(20.0, loss_scale=scaler.get_scale))
    for scale in (2.0**10, 2.0**11):
        expected = weak_field(per_sample_gradients(model, loss_of, [x]), "Fixed", 20.0)
        optimizer.zero_grad()
        scaler.scale(loss_of(model(x))).backward()
        assert optimizer.preconditioner.stats.epsilon == 20.0 / scale**2
        scaler.unscale_(optimizer)
        assert_close(flat_grad(model), expected)
        scaler.step(optimizer)
        scaler.update()


def test_attention_under_autocast_keeps_the_direction():
    model, x = Net(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(8, 2, batch_first=True)), None
    x = torch.randn(6, 5, 8)
    expected = captured_grad(copy.deepcopy(model), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grad = captured_grad(model, x)
    assert (grad - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("policy", [rgd_ext.Spectral, rgd_ext.Trace, rgd_ext.Rayleigh, rgd_ext.Fixed])
@pytest.mark.parametrize("inverse", ["weak-field", "exact"])
def test_overflow_reaches_the_grad_scaler_which_skips_the_step(policy, inverse):
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = rgd_ext.RGD(model, lr=0.1, epsilon=policy(0.5), inverse=inverse)
    before = flat(model.parameters()).clone()
    scaler.scale(loss_of(model(torch.randn(5, 6))) * 1e6).backward()
    assert not torch.isfinite(flat_grad(model)).all()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model.parameters()), before)
    assert scaler.get_scale() == 2.0**126


def test_a_bfloat16_model_has_nearly_the_direction_of_full_precision():
    model, x = mlp(), torch.randn(16, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    grad = captured_grad(model.bfloat16(), x.bfloat16())
    assert grad.dtype == torch.bfloat16
    assert (grad - expected).norm() / expected.norm() < 0.05
