"""The training samples to which RGD gives the least and the most weight, where many labels are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...diffusion.batch_gradients import batch_gradients
from ...diffusion.per_sample_loss import PerSampleLoss
from ...metric import Spectral, direction
from ..colours import BLUE, ORANGE
from ..demo.data import BATCH_SIZE, Digits
from .training import STEPS_PER_EPOCH, TERMS, initial_model, train

# The weights are averaged over the last epochs, at most so many.
LAST = 5
# The fraction of samples whose weights count as the least, and as the most.
TAIL = 0.05
ROWS, COLUMNS = 3, 8
CLEAN, WRONG = BLUE, ORANGE


class Weights(NamedTuple):
    """Weights B w_i of the training samples, (N,); those of SGD are 1.

    Attributes:
        in_batches: the weights in the training, averaged over the last epochs.
        epochs: the number of these epochs.
        in_all: the weights in a single batch of all samples at the end of the training.
    """

    in_batches: Tensor
    epochs: int
    in_all: Tensor


class Shares(NamedTuple):
    """Fractions of samples that are mislabelled.

    Attributes:
        lowest, highest: among the fraction `TAIL` of the samples with the least and with the most weight.
        overall: among all samples.
    """

    lowest: float
    highest: float
    overall: float


def measure(digits: Digits, epochs: int, advance: Callable[[], None]) -> Weights:
    """Train the demo's MLP for `epochs` epochs, and return the weights of its training samples."""
    model = initial_model()
    by_epoch = torch.empty(epochs, len(digits.train_labels), dtype=torch.float64)
    for step, (batch, stats) in enumerate(train(model, digits, epochs, advance)):
        by_epoch[step // STEPS_PER_EPOCH, batch] = stats.batch_size * stats.weights
    with batch_gradients(model, PerSampleLoss(cross_entropy)) as evaluate:
        _, grads = evaluate(digits.train_images.double(), digits.train_labels)
        _, stats = direction(grads, epsilon=Spectral(0.5))
    last = by_epoch[-LAST:]
    return Weights(last.mean(0), len(last), stats.batch_size * stats.weights)


def shares(weights: Tensor, mislabelled: Tensor) -> Shares:
    """The shares for weights (N,) and a mask (N,) of the mislabelled samples."""
    wrong = mislabelled[weights.argsort()].double()
    tail = round(TAIL * len(wrong))
    return Shares(wrong[:tail].mean().item(), wrong[-tail:].mean().item(), wrong.mean().item())


def draw(weights: Weights, digits: Digits, true_labels: Tensor, path: Path) -> None:
    """Write the figure to `path` as PNG: images with the least and the most weight, and a histogram."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    ((images, histogram),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.25, 1))
    (low,), (high,) = images.subfigures(2, 1, squeeze=False, hspace=0.05)
    order = weights.in_batches.argsort()
    number = ROWS * COLUMNS
    for part, chosen, name in ((low, order[:number], "least"), (high, order.flip(0)[:number], "most")):
        part.suptitle(f"The {number} samples with the {name} weight: label, and weight below", fontweight="bold")
        _draw_images(part, chosen, weights.in_batches, digits, true_labels)
    _draw_histogram(histogram.subplots(), weights.in_batches, digits.mislabelled)
    figure.suptitle(_title(weights, digits.mislabelled), fontsize="large")
    figure.supxlabel(f"Orange: a wrong label for the true one. {TERMS}", fontsize="medium")
    figure.savefig(path, format="png", dpi=100)


def _title(weights: Weights, mislabelled: Tensor) -> str:
    here, there = shares(weights.in_batches, mislabelled), shares(weights.in_all, mislabelled)
    tail = _percent(TAIL)
    return (
        f"Mislabelled: {_percent(here.lowest)} of the {tail} of the samples with the least weight,"
        f" {_percent(here.highest)} of the {tail} with the most, {_percent(here.overall)} of all\n"
        f"(weights in batches of {BATCH_SIZE}, mean of the last {weights.epochs} epochs; in one batch of all samples it"
        f" is {_percent(there.lowest)} and {_percent(there.highest)})"
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _draw_images(part: SubFigure, chosen: Tensor, weights: Tensor, digits: Digits, true_labels: Tensor) -> None:
    for axes, sample in zip(part.subplots(ROWS, COLUMNS).flat, chosen.tolist(), strict=True):
        given, true = digits.train_labels[sample].item(), true_labels[sample].item()
        axes.imshow(digits.train_images[sample, 0].numpy(), cmap="Greys")
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"{weights[sample].item():.2f}", labelpad=2)
        if digits.mislabelled[sample]:
            axes.set_title(f"{given} for {true}", color=WRONG, fontweight="bold", fontsize="medium", pad=3)
        else:
            axes.set_title(f"{given}", color=CLEAN, fontsize="medium", pad=3)


def _draw_histogram(axes: Axes, weights: Tensor, mislabelled: Tensor) -> None:
    limits = weights.min().item(), weights.max().item()
    filled: dict[str, Any] = {"color": CLEAN, "alpha": 0.6}
    outline: dict[str, Any] = {"color": WRONG, "histtype": "step", "linewidth": 2.5}
    for chosen, label, style in (
        (~mislabelled, "labelled correctly", filled),
        (mislabelled, "mislabelled", outline),
    ):
        label = f"{label}: {chosen.sum()}, mean weight {weights[chosen].mean():.3f}"
        axes.hist(weights[chosen].numpy(), 50, range=limits, label=label, **style)
    axes.axvline(1, color="black", linestyle="--", linewidth=1, label="SGD")
    axes.set_xlabel(r"weight of a sample, $B\,w_i$")
    axes.set_ylabel("number of training samples")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
