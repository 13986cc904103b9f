"""The error of the weak field I - eps D, as an approximation of (I + eps D)^-1, against epsilon."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from ... import geometry
from ...geometry.point import Losses
from ...metric import Fixed, Spectral, direction
from ..colours import BLUE, GREY, ORANGE
from ..demo.data import Digits
from .training import initial_model
from .trajectories import STARTS

# The values of eps lambda_max(D) for which errors are computed.
FRACTIONS = torch.logspace(-3, 1, 33, dtype=torch.float64)
SAMPLES = 64


class Errors(NamedTuple):
    """Relative errors of the weak field at each of `FRACTIONS`.

    Attributes:
        operator: |(I + eps D)^-1 - (I - eps D)|, in the spectral norm, of a problem with two weights.
        direction: |(I + eps D)^-1 g - (I - eps D) g| / |g| of the demo's MLP.
    """

    operator: Tensor
    direction: Tensor


def measure(losses: Losses, digits: Digits) -> Errors:
    """The errors at the first of `trajectories.STARTS`, and those of the initial MLP on `SAMPLES` digits."""
    x = torch.tensor(STARTS[0], dtype=torch.float64)
    largest = torch.linalg.eigvalsh(geometry.diffusion_matrix(losses, x))[-1]
    return Errors(geometry.weak_field_error(losses, x, FRACTIONS / largest), direction_errors(digits))


def direction_errors(digits: Digits) -> Tensor:
    """|(I + eps D)^-1 g - (I - eps D) g| / |g| for the MLP: shape of `FRACTIONS`."""
    grads = _per_sample_gradients(digits)
    _, stats = direction(grads, epsilon=Spectral(0.5))
    errors = []
    for epsilon in FRACTIONS.div(stats.largest_eigenvalue).tolist():  # type: ignore[arg-type]  # Spectral has it
        exact, _ = direction(grads, epsilon=Fixed(epsilon), inverse="exact")
        weak, _ = direction(grads, epsilon=Fixed(epsilon))
        squares = [(a - b).square().sum() for a, b in zip(exact, weak, strict=True)]
        errors.append(torch.stack(squares).sum().sqrt() / stats.grad_norm)
    return torch.stack(errors)


def _per_sample_gradients(digits: Digits) -> list[Tensor]:
    model = initial_model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, parameters, image[None]), label[None])

    samples = digits.train_images[:SAMPLES].double(), digits.train_labels[:SAMPLES]
    return [*vmap(grad(loss), in_dims=(None, 0, 0))(parameters, *samples).values()]


def slope(errors: Tensor) -> float:
    """The slope of the errors below eps lambda_max = 0.01, on logarithmic scales."""
    low = FRACTIONS < 0.01
    return float(np.polyfit(FRACTIONS[low].log(), errors[low].log(), 1)[0])


def at_limit(errors: Tensor) -> float:
    """The error at eps lambda_max = 1."""
    return errors[(FRACTIONS - 1).abs().argmin()].item()


def draw(errors: Errors, path: Path) -> None:
    """Write the figure to `path` as PNG."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    operator = r"neuron with two weights: $\|(I + \epsilon D)^{-1} - (I - \epsilon D)\|$"
    relative = r"MLP on digits: $|(I + \epsilon D)^{-1} g - (I - \epsilon D)\,g| \,/\, |g|$"
    axes.loglog(FRACTIONS, errors.operator, color=BLUE, marker="o", markersize=4, label=operator)
    axes.loglog(FRACTIONS, errors.direction, color=ORANGE, marker="s", markersize=4, label=relative)
    axes.loglog(FRACTIONS, FRACTIONS**2, color="black", linestyle="--", linewidth=1, label="slope 2")
    axes.axvline(1, color=GREY, linestyle=":")
    axes.annotate(
        r"limit of eq. (6), $\epsilon = 1 / \lambda_{\max}$",
        (1, errors.direction.min()),
        (-6, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
    )
    axes.set_xlabel(r"$\epsilon\,\lambda_{\max}(D)$, no unit")
    axes.set_ylabel("error of the weak field, no unit")
    axes.set_title(
        f"Slope {slope(errors.operator):.2f} (neuron) and {slope(errors.direction):.2f} (MLP) below 0.01;"
        f" error at the limit {at_limit(errors.operator):.2f} and {at_limit(errors.direction):.2f}"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, format="png", dpi=100)
