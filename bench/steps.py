"""A training step of RGD against one of SGD, zero_grad to step, on models of several kinds.

Float32; on CUDA convolutions use TF32 as torch does by default, but for the comparison with float64. Times are those of
the host, launches included, up to when the device is done.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgd_ext

from . import models
from .environment import clocks
from .measure import Samples, host_clock, interleave, ratio_text
from .report import Section, show, write_json

# A training makes one step after the other: what a change of arms does to caches and heap is not its price.
CONSECUTIVE = 4

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


def repeat(one: Callable[[], None]) -> None:
    for _ in range(CONSECUTIVE):
        one()


def per_sample_grads(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """By torch.func, in the dtype of the model."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, (x[None],))
        return F.cross_entropy(output.flatten(0, -2), y.flatten())

    return list(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y).values())


def assert_exact(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The direction of a small batch against the same from explicit gradients in float64 on the CPU."""
    x, y = x[:8], y[:8]
    model, reference = copy.deepcopy(model), copy.deepcopy(model).double().cpu()
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    step(model, rgd_ext.RGD(model, LR), x, y)
    torch.backends.cudnn.allow_tf32 = tf32
    grads = per_sample_grads(reference, x.double().cpu() if x.is_floating_point() else x.cpu(), y.cpu())
    wanted = rgd_ext.direction(grads)[0]
    difference = sum((p.grad.cpu() - want).square().sum() for p, want in zip(model.parameters(), wanted, strict=True))
    error = float((difference / sum(want.square().sum() for want in wanted)).sqrt())
    # Convolutions on CUDA may round more (Winograd, FFT).
    if not error < (1e-4 if x.is_cuda else 1e-5):
        raise AssertionError(f"{type(model).__name__}: the direction differs from float64 by {error:.1e}")


def bench(build: Callable[[], models.Example], device: str, rounds: int) -> Samples:
    """Times of a step of each optimizer, as the mean of consecutive ones."""
    model, x, y = (part.to(device) for part in build())
    assert_exact(model, x, y)
    timed = {}
    for name, build_optimizer in OPTIMIZERS.items():
        clone = copy.deepcopy(model)
        one = partial(step, clone, build_optimizer(clone), x, y)
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        timed[name] = host_clock(partial(repeat, one), CONSECUTIVE, synchronize, settle=one)
    return interleave(timed, rounds)


def section(what: str, samples: Samples) -> Section:
    """Rows of a table; the first arm is what the others are compared with."""
    first = next(iter(samples))
    return [
        [
            what if name == first else "",
            name,
            f"{statistics.median(times):.2f}",
            f"{min(times):.2f}",
            ratio_text(samples, name, first),
        ]
        for name, times in samples.items()
    ]


def run(device: str, quick: bool, json: str | None) -> list[str]:
    """Run all models, print a table and write the raw samples; returns what failed."""
    before = clocks()
    torch.manual_seed(0)
    builds = {"MLP 784-1024-1024-10, B = 128": models.mlp}
    if not quick:
        builds |= {"ResNet-GN 0.3M, B = 64": models.resnet, "GPT 4 x 256, T = 128, B = 16": models.gpt}
    many = 5 if quick else 60
    results, failures = {}, []
    for name, build in builds.items():
        # Steps on the GPU are short.
        rounds = many if device == "cuda" or build is models.mlp else 8
        try:
            results[name] = bench(build, device, rounds)
        except (AssertionError, RuntimeError) as problem:
            failures.append(f"{name}: {problem}")
    header = ("model", "optimizer", "median ms", "min ms", "time / SGD (quartiles)")
    show(header, [section(*result) for result in results.items()], f"training step, float32, {device}")
    if json:
        record = {"benchmark": "steps", "device": device, "milliseconds": results, "failures": failures}
        write_json(json, record, before)
    return failures
