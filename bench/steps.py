"""A training step of RGD against one of SGD, zero_grad to step, on models of several kinds. Float32, CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgd_ext

from . import models
from .measure import Samples, interleave, show, write_json

# So small that all arms stay on about the same weights, with gradients of the same size.
LR = 1e-6

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), LR),
    "RGD Spectral": lambda model: rgd_ext.RGD(model, LR, epsilon=rgd_ext.Spectral(0.5)),
    "RGD Rayleigh": lambda model: rgd_ext.RGD(model, LR, epsilon=rgd_ext.Rayleigh(0.5)),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    output = model(x)
    F.cross_entropy(output.flatten(0, -2), y.flatten()).backward()
    optimizer.step()


def per_sample_grads(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """By torch.func, in the dtype of the model."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, (x[None],))
        return F.cross_entropy(output.flatten(0, -2), y.flatten())

    return list(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y).values())


def assert_exact(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The direction of a small batch against the same from explicit gradients in float64."""
    x, y = x[:8], y[:8]
    model, reference = copy.deepcopy(model), copy.deepcopy(model).double()
    step(model, rgd_ext.RGD(model, LR), x, y)
    grads = per_sample_grads(reference, x.double() if x.is_floating_point() else x, y)
    wanted = rgd_ext.direction(grads)[0]
    difference = sum((p.grad - want).square().sum() for p, want in zip(model.parameters(), wanted, strict=True))
    error = (difference / sum(want.square().sum() for want in wanted)).sqrt()
    if not error < 1e-5:
        raise AssertionError(f"{type(model).__name__}: the direction differs from float64 by {error:.1e}")


def bench(build: Callable[[], tuple[nn.Module, Tensor, Tensor]], rounds: int) -> Samples:
    """Times of one step of each optimizer."""
    model, x, y = build()
    assert_exact(model, x, y)
    arms = {}
    for name, build_optimizer in OPTIMIZERS.items():
        clone = copy.deepcopy(model)
        arms[name] = partial(step, clone, build_optimizer(clone), x, y)
    return interleave(arms, rounds)


def run(quick: bool, json_path: str | None) -> None:
    """Run all models, print a table and write the raw samples."""
    torch.manual_seed(0)
    builds = {"MLP 784-1024-1024-10, B = 128": models.mlp}
    if not quick:
        builds |= {"ResNet-GN 0.3M, B = 64": models.resnet, "GPT 4 x 256, T = 128, B = 16": models.gpt}
    rounds = {"MLP 784-1024-1024-10, B = 128": 20 if quick else 100}
    results = {name: bench(build, rounds.get(name, 15)) for name, build in builds.items()}
    show(results, "training step, float32, CPU")
    if json_path:
        write_json(json_path, {"benchmark": "steps", "milliseconds": results})
