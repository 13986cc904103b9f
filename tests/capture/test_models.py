"""Whole models match the oracle, with every policy and inverse, for all reductions, and over whole trainings."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import GPT, MODELS, mlp
from oracle import assert_close, direction, flat, flat_grad, per_sample_gradients, weak_field

import rgd_ext


def labels(output):
    return torch.arange(output.numel() // output.shape[-1]).view(output.shape[:-1]) % output.shape[-1]


def mean_loss(output):
    if output.shape[-1] == 2:  # the siamese net's two similarities
        return output.square().mean()
    return F.cross_entropy(output.flatten(0, -2), labels(output).flatten())


def sum_loss(output):
    return mean_loss(output) * output.shape[0] * 7


def padded_loss(output):
    """A mean over the tokens that are not padding, of which samples have different numbers."""
    targets = labels(output)
    targets = torch.where(torch.arange(targets.shape[1]) < 1 + torch.arange(len(targets))[:, None] % 5, targets, -100)
    return F.cross_entropy(output.flatten(0, -2), targets.flatten(), ignore_index=-100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("name", MODELS)
def test_model_matches_oracle(name, batch, dtype):
    build, sample = MODELS[name]
    model = build().to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in sample(batch)]
    expected = per_sample_gradients(model, mean_loss, inputs)
    with rgd_ext.precondition(model) as handle:
        mean_loss(model(*inputs)).backward()
    assert_close(flat_grad(model), weak_field(expected) if batch > 1 else expected[0])
    assert handle.stats.batch_size == batch


@pytest.mark.parametrize("inverse", ["weak-field", "exact"])
@pytest.mark.parametrize("policy", ["Spectral", "Trace", "Rayleigh", "Fixed"])
@pytest.mark.parametrize("name", ["MLP", "ResNet", "siamese"])
def test_policies_and_inverses_match_the_explicit_diffusion_matrix(name, policy, inverse):
    build, sample = MODELS[name]
    model = build().double()
    inputs = [x.double() for x in sample(6)]
    expected = direction(per_sample_gradients(model, mean_loss, inputs), policy, 0.4, inverse)
    with rgd_ext.precondition(model, epsilon=getattr(rgd_ext, policy)(0.4), inverse=inverse) as handle:
        for _ in range(2):  # a plan is made, and remembered
            model.zero_grad()
            mean_loss(model(*inputs)).backward()
            assert_close(flat_grad(model), expected, torch.float64)
            assert_close(handle.stats.direction_norm, expected.norm(), torch.float64)


@pytest.mark.parametrize("loss", [mean_loss, sum_loss, padded_loss])
def test_reductions_and_padded_tokens_match_the_oracle(loss):
    model, inputs = GPT().double(), MODELS["GPT"][1](7)
    expected = weak_field(per_sample_gradients(model, loss, inputs))
    with rgd_ext.precondition(model):
        loss(model(*inputs)).backward()
    assert_close(flat_grad(model), expected)


@pytest.mark.parametrize("policy", ["Spectral", "Trace", "Rayleigh"])
def test_direction_scales_with_the_loss(policy):
    model, (x,) = mlp().double(), MODELS["MLP"][1](6)
    with rgd_ext.precondition(model, epsilon=getattr(rgd_ext, policy)(0.5)):
        mean_loss(model(x.double())).backward()
        expected = flat_grad(model) * 1024
        model.zero_grad()
        (mean_loss(model(x.double())) * 1024).backward()
    assert_close(flat_grad(model), expected)


@pytest.mark.parametrize("name", ["MLP", "GPT", "ViT", "ResNet", "LSTM classifier"])
def test_training_follows_the_oracle_for_fifty_steps(name):
    build, sample = MODELS[name]
    model = build().double()
    twin = copy.deepcopy(model)
    optimizer = rgd_ext.RGD(model, lr=0.05, momentum=0.9, weight_decay=1e-3)
    reference = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for step in range(50):
        inputs = [x.double() if x.is_floating_point() else x for x in sample(2 + step % 5)]
        optimizer.zero_grad()
        mean_loss(model(*inputs)).backward()
        optimizer.step()
        expected = weak_field(per_sample_gradients(twin, mean_loss, inputs))
        for parameter in twin.parameters():
            parameter.grad = expected[: parameter.numel()].view_as(parameter)
            expected = expected[parameter.numel() :]
        reference.step()
    error = flat(model.parameters()) - flat(twin.parameters())
    assert error.norm() < 1e-9 * flat(twin.parameters()).norm()
