"""The gradient noise scales of all samples at one point, and the Gramian of their gradients, in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rgd_ext

from ..curvature.comparison import hessian
from ..data import Samples

# Batches are drawn from the N samples with replacement: mu is the gradient of all, and Sigma the covariance of theirs.
Scales = dict[str, float]


def gramian(model: nn.Module, samples: Samples) -> Tensor:
    """<g_i, g_j> for the per-sample gradients g_i, (N, N)."""
    model = copy.deepcopy(model).double()
    with rgd_ext.observe(model, gram=True) as handle:
        cross_entropy(model(samples.inputs.double()), samples.labels).backward()
    return handle.stats.gram


def scales(model: nn.Module, samples: Samples, gram: Tensor, probes: Tensor) -> Scales:
    """What the noise scales are made of.

    Args:
        gram: the Gramian of the samples.
        probes: (P, N), as `signs` gives them.

    Returns:
        loss: the mean over all samples.
        trace, squared_norm: tr Sigma and |mu|^2.
        hessian_trace: tr(H Sigma), with H the Hessian of the mean loss, the mean of v^T H v over vectors
            v = N^(-1/2) sum_i z_i (g_i - mu), one for each probe z (Hutchinson's estimator).
        curvature: mu^T H mu.
    """
    model = copy.deepcopy(model).double()
    inputs, labels = samples.inputs.double(), samples.labels
    mean, product = hessian(model, inputs, labels)
    losses = cross_entropy(model(inputs), labels, reduction="none")
    forms = []
    for probe in probes:
        weights = (probe - probe.mean()) / len(probe) ** 0.5
        parts = torch.autograd.grad(losses, list(model.parameters()), weights, retain_graph=True)
        vector = torch.cat([part.flatten() for part in parts])
        forms.append(vector @ product(vector))
    return {
        "loss": losses.mean().item(),
        "trace": (gram.diagonal().mean() - gram.mean()).item(),
        "squared_norm": gram.mean().item(),
        "hessian_trace": torch.stack(forms).mean().item(),
        "curvature": (mean @ product(mean)).item(),
    }


def signs(probes: int, samples: int, seed: int) -> Tensor:
    """Independent signs, (P, N)."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(2, (probes, samples), generator=generator).double() - 1
