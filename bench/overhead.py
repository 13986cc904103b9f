"""What the capture costs per layer: the time of a step above that of SGD, on layers with very little to compute.

It is computed from the difference between a shallow and a deep model, which leaves out the fixed cost of a step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .measuring.report import Record, Section, show
from .measuring.timing import Samples, host_clock, interleave, synchronize
from .training.arms import CONSECUTIVE, OURS, Training, repeat
from .training.candidates import compare_with_float64
from .training.result import Result

SHALLOW, DEEP = 10, 50

# By name: a function that makes the layer, and the shape of its inputs.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear(8, 8)": (partial(nn.Linear, 8, 8), (4, 8)),
    "Linear(8, 8), sequences": (partial(nn.Linear, 8, 8), (4, 5, 8)),
    "LayerNorm(8)": (partial(nn.LayerNorm, 8), (4, 8)),
    "GroupNorm(2, 4)": (partial(nn.GroupNorm, 2, 4), (4, 4, 6, 6)),
    "Conv2d(4, 4, 3)": (partial(nn.Conv2d, 4, 4, 3, padding=1), (4, 4, 6, 6)),
}


def stack(build: Callable[[], nn.Module], depth: int, x: Tensor) -> nn.Module:
    """So many layers, each followed by an activation, and a classifier."""
    layers = [module for _ in range(depth) for module in (build(), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(x[0].numel(), 3)).to(x.device)


def bench(build: Callable[[], nn.Module], shape: tuple[int, ...], device: str, rounds: int) -> dict[str, Samples]:
    """Milliseconds of a step, by depth and optimizer."""
    x, y = torch.randn(shape, device=device), torch.randint(3, shape[:1], device=device)
    compare_with_float64(stack(build, 2, x), x, y, Result(""))
    wait, timed = synchronize(device), {}
    for depth in (SHALLOW, DEEP):
        model = stack(build, depth, x)
        for name, arm in OURS.items():
            one = Training(arm, model, x, y)
            timed[f"{depth} {name}"] = host_clock(partial(repeat, one), CONSECUTIVE, wait, settle=one)
    samples = interleave(timed, rounds)
    return {str(depth): {name: samples[f"{depth} {name}"] for name in OURS} for depth in (SHALLOW, DEEP)}


def per_layer(samples: dict[str, Samples], name: str) -> list[float]:
    """Microseconds per layer and step, round by round."""
    pairs = zip(samples[str(SHALLOW)][name], samples[str(DEEP)][name], strict=True)
    return [1e3 * (deep - shallow) / (DEEP - SHALLOW) for shallow, deep in pairs]


def section(layer: str, samples: dict[str, Samples]) -> Section:
    """Rows of a table."""
    rows, sgd = [], per_layer(samples, "SGD")
    for name in OURS:
        times = per_layer(samples, name)
        lower, median, upper = statistics.quantiles([time - base for time, base in zip(times, sgd, strict=True)], n=4)
        above = "" if name == "SGD" else f"{median:.1f} ({lower:.1f} to {upper:.1f})"
        rows.append([layer if not rows else "", name, f"{statistics.median(times):.1f}", above])
    return rows


def run(device: str, quick: bool, json: str | None) -> list[str]:
    """Run all layers, print a table and write the raw samples; a direction that is not exact raises."""
    record = Record(json, "overhead", device)
    torch.manual_seed(0)
    results = {name: bench(*layer, device, rounds=3 if quick else 60) for name, layer in LAYERS.items()}
    header = ("layer", "optimizer", "us per layer", "us above SGD (quartiles)")
    show(header, [section(*result) for result in results.items()], f"a layer's part of a training step, {device}")
    record.write(milliseconds=results)
    return []
