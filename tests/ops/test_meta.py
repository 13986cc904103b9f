"""Steps on tensors without numbers: reading one raises, so nothing makes the host wait for a device."""

import pytest
import torch
from capturing import loss_of
from models import MODELS
from torch._subclasses import FakeTensorMode

import rgd_ext
from rgd_ext import metric

PAIRS = [(policy(0.1), inverse) for policy in metric.POLICIES for inverse in metric.INVERSES]
PAIRS.remove((rgd_ext.Ascent(0.1), "exact"))  # is refused
# Their positions are told from their tokens by where they lie in memory, which meta tensors do nowhere.
PLACED = ("GPT", "GPT, positions (1, T)")


def train(name, steps=3, **options):
    build, inputs_of = MODELS[name]
    model, inputs = build(), inputs_of(5)
    optimizer = rgd_ext.RGD(model, lr=0.1, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(*inputs)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("policy", "inverse"), PAIRS, ids=repr)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in PLACED])
def test_a_step_reads_no_number(name, policy, inverse):
    with torch.device("meta"):
        model = train(name, epsilon=policy, inverse=inverse)
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("rule", [rgd_ext.weights.Clip(0.1), rgd_ext.weights.Normalise()], ids=repr)
@pytest.mark.parametrize("name", ["MLP", "ResNet"])
def test_a_step_by_a_rule_reads_no_number(name, rule):
    with torch.device("meta"):
        model = train(name, weights=rule)
    assert all(p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", ["MLP", "ResNet"])
def test_statistics_and_products_of_an_observed_model_read_no_number(name):
    build, inputs_of = MODELS[name]
    with torch.device("meta"), rgd_ext.observe(model := build()) as handle:
        handle.align([torch.empty_like(p) for p in model.parameters()])
        loss_of(model(*inputs_of(5))).backward()
        stats = handle.stats
        for value in (stats.noise_scale, stats.sample_norms, stats.aligned, stats.cosine):
            assert value.is_meta


@pytest.mark.parametrize(("policy", "inverse"), PAIRS, ids=repr)
def test_direction_reads_no_number(policy, inverse):
    grads = [torch.empty(6, *shape, device="meta") for shape in ((3, 4), (5,))]
    step, stats = rgd_ext.direction(grads, epsilon=policy, inverse=inverse)
    assert [tuple(s.shape) for s in step] == [(3, 4), (5,)]
    assert stats.weights.is_meta


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_step_runs_on_fake_tensors():
    with FakeTensorMode():
        model = train("MLP")
    assert all(p.grad.shape == p.shape for p in model.parameters())
