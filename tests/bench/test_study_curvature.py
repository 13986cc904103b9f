"""The comparison of D with the Hessian, against dense matrices."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from bench.studying.curvature import comparison
from bench.studying.curvature.comparison import compare
from bench.studying.data import Samples, Sources
from bench.studying.questions.curvature import QUESTION


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    return Samples(torch.randn(12, 1, 2, 2, generator=generator), torch.arange(12) % 4)


def dense(model, samples):
    """The gradient, D and the Hessian as float64 arrays."""
    model = model.double()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    x = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def losses(x):
        parts = x.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        outputs = functional_call(model, weights, (samples.inputs.double(),))
        return cross_entropy(outputs, samples.labels, reduction="none")

    gradients = jacrev(losses)(x)
    centred = gradients - gradients.mean(0)
    matrix = centred.T @ centred / len(gradients)
    return (
        each.detach().numpy() for each in (gradients.mean(0), matrix, jacrev(jacrev(lambda x: losses(x).mean()))(x))
    )


def test_comparison_is_that_of_the_dense_matrices(model, samples, monkeypatch):
    monkeypatch.setattr(comparison, "LARGEST", 5)
    monkeypatch.setattr(comparison, "SHARED", 3)
    found = compare(model, samples)
    gradient, diffusion, curved = dense(model, samples)
    left, right = diffusion @ gradient, curved @ gradient
    assert found["grad_norm"] == pytest.approx(np.linalg.norm(gradient))
    assert found["cosine"] == pytest.approx(left @ right / np.linalg.norm(left) / np.linalg.norm(right))
    assert found["scale"] == pytest.approx(np.linalg.lstsq(left[:, None], right, rcond=None)[0][0])
    assert found["trace"] == pytest.approx(np.trace(diffusion))
    values, vectors = np.linalg.eigh(diffusion)
    curvatures, directions = np.linalg.eigh(curved)
    assert found["diffusion"] == pytest.approx(values[:-6:-1], rel=1e-4)
    assert found["hessian"] == pytest.approx(curvatures[:-6:-1], rel=1e-4)
    shared = np.square(vectors[:, -3:].T @ directions[:, -3:]).sum() / 3
    assert found["shared"] == pytest.approx(shared, rel=1e-3)


def test_comparison_leaves_the_model_alone(model, samples):
    before = [parameter.clone() for parameter in model.parameters()]
    compare(model, samples)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_run_is_a_pure_function_with_a_comparison_at_every_point():
    config = {
        "data": "digits",
        "samples": 60,
        "labels": "symmetric 0.4",
        "model": "small MLP",
        "method": "SGD",
        "lr": 0.05,
        "momentum": 0.9,
        "batch_size": 20,
        "steps": 20,
        "seed": 0,
    }
    first = QUESTION.run(config, Sources())
    torch.rand(1)
    assert QUESTION.run(config, Sources()) == first
    assert {len(values) for values in first.values()} == {2}
    assert first["loss"][1] < first["loss"][0]
