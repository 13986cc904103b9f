"""How the diffusion matrix D and the Hessian H of the same samples' mean loss compare at one point of a training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rgd_ext

from ..data import Samples

POINTS = (0, 20, 60, 200, 600)  # steps of a training after which D and H are compared
LARGEST = 10  # eigenvalues of each
SHARED = 9  # leading eigenvectors whose spans are compared: one less than there are classes
Product = Callable[[Tensor], Tensor]


def compare(model: nn.Module, samples: Samples) -> dict[str, float | list[float]]:
    """D and H of the samples, in float64.

    Returns:
        loss, grad_norm: of the mean.
        cosine: of D g and H g. The best multiple of D g for H g, in the sense of least squares, leaves the share
            (1 - cosine^2)^(1/2) of H g.
        scale: that multiple, <D g, H g> / |D g|^2, so that H g is about scale D g.
        shared: |U^T V|^2 / k for the leading k = `SHARED` eigenvectors U of D and V of H: 1 where they span the same
            space, k / d for random ones.
        diffusion, hessian: the largest eigenvalues of both, falling.
        trace: of D.
    """
    model = _double(model)
    inputs, labels = samples.inputs.double(), samples.labels
    gradient, product = hessian(model, inputs, labels)
    matrix = rgd_ext.DiffusionMatrix.from_batch(model, cross_entropy, inputs, labels)
    of_diffusion, of_hessian = matrix @ gradient, product(gradient)
    values, vectors = largest(lambda v: matrix @ v, len(gradient))
    curvatures, directions = largest(product, len(gradient))
    inner = of_diffusion @ of_hessian
    return {
        "loss": cross_entropy(model(inputs), labels).item(),
        "grad_norm": gradient.norm().item(),
        "cosine": (inner / of_diffusion.norm() / of_hessian.norm()).item(),
        "scale": (inner / of_diffusion.square().sum()).item(),
        "shared": float(np.square(vectors[:, :SHARED].T @ directions[:, :SHARED]).sum() / SHARED),
        "diffusion": values.tolist(),
        "hessian": curvatures.tolist(),
        "trace": matrix.trace().item(),
    }


def _double(model: nn.Module) -> nn.Module:
    """A copy in float64; the training of the model itself goes on in float32."""
    return copy.deepcopy(model).double()


def hessian(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Product]:
    """The gradient of the mean loss, (d,), and the function v -> H v, both in the order of `model.parameters()`."""
    parameters = list(model.parameters())
    loss = cross_entropy(model(inputs), labels)
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, create_graph=True)])

    def product(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(gradient, parameters, vector, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    return gradient.detach(), product


def largest(product: Product, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The `LARGEST` eigenvalues of a symmetric matrix, falling, and their eigenvectors (size, LARGEST)."""
    operator = LinearOperator(
        (size, size), lambda v: product(torch.from_numpy(v.reshape(-1))).numpy(), dtype=np.float64
    )
    # A fixed start, so that the outcome is the same every time.
    values, vectors = eigsh(operator, k=LARGEST, which="LA", tol=1e-4, v0=np.ones(size))
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order]
