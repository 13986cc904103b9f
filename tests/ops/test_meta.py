"""Steps on tensors without numbers: reading one raises, so nothing makes the host wait for a device."""

import pytest
import torch
from capturing import loss_of
from models import MODELS
from torch._subclasses import FakeTensorMode

import rgd_ext
from rgd_ext import metric

POLICIES = [policy(0.1) for policy in metric.POLICIES]
# Their positions are told from their tokens by where they lie in memory, which meta tensors do nowhere.
PLACED = ("GPT", "GPT, positions (1, T)")


def train(name, policy, inverse, steps=3):
    build, inputs_of = MODELS[name]
    model, inputs = build(), inputs_of(5)
    optimizer = rgd_ext.RGD(model, lr=0.1, epsilon=policy, inverse=inverse)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(*inputs)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("inverse", metric.INVERSES)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in PLACED])
def test_a_step_reads_no_number(name, policy, inverse):
    with torch.device("meta"):
        model = train(name, policy, inverse)
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("inverse", metric.INVERSES)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_direction_reads_no_number(policy, inverse):
    grads = [torch.empty(6, *shape, device="meta") for shape in ((3, 4), (5,))]
    step, stats = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    assert [tuple(s.shape) for s in step] == [(3, 4), (5,)]
    assert stats.weights.is_meta


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_step_runs_on_fake_tensors():
    with FakeTensorMode():
        model = train("MLP", rgd_ext.Spectral(0.5), "weak-field")
    assert all(p.grad.shape == p.shape for p in model.parameters())
