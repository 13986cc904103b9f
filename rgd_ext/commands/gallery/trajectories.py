"""Paths of gradient descent, SGD and RGD on a problem with two weights, over level sets of f and ellipses of D."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from torch import Tensor
from torch.func import jacrev, vmap

from ... import geometry
from ...geometry.point import Losses
from ...metric import Spectral, direction
from ..colours import BLUE, GREEN, GREY, ORANGE

SAMPLES, LEARNING_RATE, STEPS = 60, 0.5, 100
BATCH_SIZE, SGD_PATHS = 4, 3
FRACTION = 0.9
STARTS = ((-2.3, 1.6), (1.6, 2.1))
LIMITS = (-2.75, 2.75), (-1.6, 2.75)
POINTS = [(x, y) for x in (-2.0, -0.9, 0.4, 1.4, 2.3) for y in (-1.1, 0.0, 1.1, 2.3)]
# The half-axes of the ellipses, in standard deviations of one sample's gradient.
DEVIATIONS = 0.5
STYLES: dict[str, dict[str, Any]] = {
    "SGD": {"color": GREY, "linewidth": 0.7},
    "gradient flow": {"color": BLUE, "linewidth": 2.5},
    "RGD flow": {"color": ORANGE, "linewidth": 2.5},
    "RGD steps": {"color": "black", "linestyle": "", "marker": ".", "markersize": 5, "markevery": 3},
}

Paths = dict[str, Tensor]


def neuron() -> Losses:
    """f_i(x) = (tanh <u_i, x> - y_i)^2 / 2 with noise in the targets y_i that grows as the input u_i nears an axis.

    Wherever the neuron is not saturated, D is therefore large along that axis, along which the gradient may be small.
    """
    generator = torch.Generator().manual_seed(0)
    angle = torch.tensor(0.6, dtype=torch.float64)
    axes = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])
    inputs = torch.randn(SAMPLES, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.6]) @ axes
    noise = torch.randn(SAMPLES, generator=generator, dtype=torch.float64) * (inputs @ axes[1]) / inputs.norm(dim=1)
    targets = torch.tanh(inputs @ torch.tensor([0.3, -0.2], dtype=torch.float64)) + noise
    return lambda x: (torch.tanh(inputs @ x) - targets).square() / 2


def measure(losses: Losses, advance: Callable[[], None]) -> list[Paths]:
    """The paths from each of `STARTS`.

    Returns:
        For each start, the positions (paths, STEPS + 1, 2) at the times LEARNING_RATE * step by the names of `STYLES`.
    """
    times = LEARNING_RATE * torch.arange(STEPS + 1)
    terms: dict[str, Any] = {"lr": LEARNING_RATE, "batch_size": BATCH_SIZE, "paths": SGD_PATHS}
    results = []
    for start in torch.tensor(STARTS, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        sgd = geometry.sgd_paths(losses, start, STEPS, **terms, generator=generator)
        flow = geometry.rgd_flow(losses, start, times, Spectral(FRACTION), rtol=1e-6, atol=1e-9)
        paths = sgd, geometry.gradient_flow(losses, start, times)[None], flow[None], rgd_steps(losses, start)[None]
        results.append(dict(zip(STYLES, paths, strict=True)))
        advance()
    return results


def rgd_steps(losses: Losses, start: Tensor) -> Tensor:
    """x <- x - lr (I - eps D) g over all samples, eq. (10): shape (STEPS + 1, 2)."""
    positions = [start]
    for _ in range(STEPS):
        (step,), _ = direction(jacrev(losses)(positions[-1]), epsilon=Spectral(FRACTION))
        positions.append(positions[-1] - LEARNING_RATE * step)
    return torch.stack(positions)


def draw(losses: Losses, results: list[Paths], path: Path) -> None:
    """Write the figure of what `measure` returned to `path` as PNG."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    plane, decay = figure.subplots(1, 2, width_ratios=(1.75, 1))
    mean = vmap(lambda x: losses(x).mean())
    _draw_level_sets(plane, mean)
    _draw_ellipses(plane, losses)
    times = LEARNING_RATE * torch.arange(STEPS + 1)
    for paths in results:
        for name, positions in paths.items():
            for points in positions:
                plane.plot(*points.T, **STYLES[name])
                decay.plot(times, mean(points), **STYLES[name])
        plane.plot(*positions[0, 0].tolist(), marker="s", color="black", markersize=8)
    plane.set_title(f"A neuron with two weights, {SAMPLES} samples: level sets of f, and D", fontsize="large")
    decay.set_title("Loss along the paths", fontsize="large")
    decay.set_xlabel("time (steps times learning rate)")
    decay.set_ylabel("loss f, half the mean squared error")
    decay.set_xlim(0, LEARNING_RATE * STEPS)
    decay.grid(alpha=0.3)
    _legend(figure)
    figure.savefig(path, format="png", dpi=100)


def _draw_level_sets(axes: Axes, mean: Callable[[Tensor], Tensor]) -> None:
    columns, rows = (torch.linspace(*limits, 120, dtype=torch.float64) for limits in LIMITS)
    x, y = torch.meshgrid(columns, rows, indexing="xy")
    values = mean(torch.stack([x.flatten(), y.flatten()], 1)).view_as(x)
    axes.contourf(x, y, values, 24, cmap="Greys", alpha=0.45)
    axes.contour(x, y, values, 24, colors="white", linewidths=0.8)
    axes.set(xlim=LIMITS[0], ylim=LIMITS[1], aspect="equal", xlabel="weight $x_1$", ylabel="weight $x_2$")


def _draw_ellipses(axes: Axes, losses: Losses) -> None:
    for point in POINTS:
        matrix = geometry.diffusion_matrix(losses, torch.tensor(point, dtype=torch.float64))
        values, vectors = torch.linalg.eigh(matrix)
        width, height = 2 * DEVIATIONS * values.sqrt()
        angle = math.degrees(torch.atan2(*vectors[:, 0].flip(0)))
        axes.add_patch(Ellipse(point, width, height, angle=angle, fill=False, color=GREEN, linewidth=1.5))


def _legend(figure: Figure) -> None:
    labels = {
        "gradient flow": "gradient flow",
        "SGD": f"SGD, batches of {BATCH_SIZE}, learning rate {LEARNING_RATE}: {SGD_PATHS} paths",
        "RGD flow": rf"RGD flow (10), $\epsilon = {FRACTION} / \lambda_{{\max}}(D)$",
        "RGD steps": f"RGD, learning rate {LEARNING_RATE}: every third step",
    }
    lines = [Line2D([], [], **STYLES[name], label=label) for name, label in labels.items()]
    ellipse = rf"D: half-axes {DEVIATIONS} $\sqrt{{\lambda}}$ of its eigenvalues $\lambda$"
    lines.append(Line2D([], [], linestyle="", marker="o", fillstyle="none", color=GREEN, markersize=10, label=ellipse))
    lines.append(Line2D([], [], linestyle="", marker="s", color="black", markersize=8, label="start"))
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
