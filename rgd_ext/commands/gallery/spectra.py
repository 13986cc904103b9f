"""The spectrum of D during the training of a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...diffusion import DiffusionMatrix
from ..colours import BLUE, GREEN, ORANGE
from ..demo.data import Digits
from .training import STEPS_PER_EPOCH, TERMS, initial_model, train

# The number of steps from one computation of the spectrum to the next.
EVERY = STEPS_PER_EPOCH // 4

# For numbers of steps taken, the eigenvalues of D of all training samples, descending, (N - 1,).
Spectra = dict[int, Tensor]


def measure(digits: Digits, epochs: int, advance: Callable[[], None]) -> Spectra:
    """Train the demo's MLP for `epochs` epochs; its spectra before the first and after every `EVERY` steps."""
    model = initial_model()
    images = digits.train_images.double()

    def spectrum() -> Tensor:
        return DiffusionMatrix.from_batch(model, cross_entropy, images, digits.train_labels).spectrum()

    spectra = {0: spectrum()}
    for step, _ in enumerate(train(model, digits, epochs, advance), 1):
        if step % EVERY == 0:
            spectra[step] = spectrum()
    return spectra


def effective_rank(eigenvalues: Tensor) -> float:
    """(tr D)^2 / tr D^2: 1 if only one eigenvalue is positive, n if n eigenvalues are equal and all others are 0."""
    return (eigenvalues.sum().square() / eigenvalues.square().sum()).item()


def draw(spectra: Spectra, path: Path) -> None:
    """Write the figure to `path` as PNG: eigenvalues against index after each epoch, and three summaries over steps."""
    figure = Figure(figsize=(14, 7.6), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.3, 1))
    _draw_eigenvalues(left.subplots(), spectra)
    _draw_summary(right.subplots(3, sharex=True), spectra)
    figure.suptitle(f"D of all training digits, clean labels ({TERMS})", fontsize="large")
    figure.savefig(path, format="png", dpi=100)


def _draw_eigenvalues(axes: Axes, spectra: Spectra) -> None:
    epochs = {step // STEPS_PER_EPOCH: values for step, values in spectra.items() if step % STEPS_PER_EPOCH == 0}
    colours = ScalarMappable(Normalize(0, max(epochs)), colormaps["viridis"])
    for epoch, values in epochs.items():
        axes.loglog(range(1, len(values) + 1), values, color=colours.to_rgba(epoch), linewidth=1.3)  # type: ignore[arg-type]  # or a number
    largest = max(values[0].item() for values in spectra.values())
    axes.set_ylim(1e-9 * largest, 2 * largest)
    axes.set_xlabel("index of the eigenvalue, from the largest")
    axes.set_ylabel("eigenvalue of D, |gradient|²")
    axes.grid(alpha=0.3)
    axes.figure.colorbar(colours, ax=axes, label="epochs of training", ticks=MaxNLocator(integer=True), aspect=40)


def _draw_summary(panels: list[Axes], spectra: Spectra) -> None:
    steps, eigenvalues = [*spectra], [*spectra.values()]
    curves = {
        r"$\lambda_{\max}(D)$, |gradient|²": [values[0].item() for values in eigenvalues],
        r"$\mathrm{tr}\,D$, |gradient|²": [values.sum().item() for values in eigenvalues],
        r"effective rank, $(\mathrm{tr}\,D)^2 / \mathrm{tr}\,D^2$": [effective_rank(values) for values in eigenvalues],
    }
    for axes, (label, values), colour in zip(panels, curves.items(), (ORANGE, BLUE, GREEN), strict=True):
        axes.plot(steps, values, color=colour, marker=".", markersize=5)
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.05 * max(values))
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel(f"step ({STEPS_PER_EPOCH} in an epoch)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].figure.align_ylabels(panels)
