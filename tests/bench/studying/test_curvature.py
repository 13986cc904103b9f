"""The comparison of D with the Hessian, against dense matrices."""

import numpy as np
import oracle
import pytest
import torch
from dense import Dense, assert_left_alone

from bench.studying.curvature import comparison
from bench.studying.curvature.comparison import compare
from bench.studying.data import Sources
from bench.studying.questions.curvature import QUESTION


def matrices(model, samples):
    """The gradient, D and the Hessian as float64 arrays."""
    dense = Dense(model, samples)
    gradients = dense.gradients
    return gradients.mean(0).numpy(), oracle.diffusion_matrix(gradients).numpy(), dense.hessian.numpy()


def test_comparison_is_that_of_the_dense_matrices(model, samples, monkeypatch):
    monkeypatch.setattr(comparison, "LARGEST", 5)
    monkeypatch.setattr(comparison, "SHARED", 3)
    found = compare(model, samples)
    gradient, diffusion, curved = matrices(model, samples)
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
    assert_left_alone(model, lambda model: compare(model, samples))


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
