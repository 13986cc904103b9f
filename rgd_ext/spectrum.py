"""The largest eigenvalues of D of a model and a data set: a table and a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from .diffusion import DiffusionMatrix

# From how many seconds on a computation is announced.
LONG = 2


class Spectrum(NamedTuple):
    """What was found about D.

    Attributes:
        dimension, samples: d and N.
        trace: of D.
        rank: of D, or None where all eigenvalues are too many to compute.
        eigenvalues: the largest that are positive beyond rounding, descending.
    """

    dimension: int
    samples: int
    trace: float
    rank: int | None
    eigenvalues: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Of the trace, cumulative."""
        return self.eigenvalues.cumsum() / self.trace


def build(
    model: nn.Module, loss: Callable, data: Iterable, checkpoint: Path | None = None, progress: bool = False
) -> DiffusionMatrix:
    """D for a tuple (x, y), which is one batch, or for a loader; with the model in evaluation mode.

    Raises:
        ValueError: for a checkpoint of a batch, and as `DiffusionMatrix` does.
    """
    model.eval()
    if not isinstance(data, tuple):
        return DiffusionMatrix.from_dataset(model, loss, data, checkpoint=checkpoint, progress=progress)
    if len(data) != 2:
        raise ValueError(f"data is a tuple of {len(data)}: return a pair (x, y), or a loader that gives pairs")
    if checkpoint is not None:
        raise ValueError("a checkpoint is for passes over a loader, and the data is one batch (x, y): leave it out")
    return DiffusionMatrix.from_batch(model, loss, *data)


def compute(matrix: DiffusionMatrix, k: int) -> Spectrum:
    """The k largest eigenvalues of D, or all that are positive where those are fewer."""
    values = matrix.spectrum(k)
    try:
        rank = matrix.rank()
    except RuntimeError:  # known only in part
        rank = None
    values = values[:rank].cpu().numpy()
    return Spectrum(matrix.shape[0], matrix.num_samples, matrix.trace().item(), rank, values[values > 0])


def run(matrix: DiffusionMatrix, k: int | None, output: Path, quiet: bool) -> None:
    """Print what D is like, and write the figure to `output`; `k` is 20 by default, or d where that is less."""
    console = Console(highlight=False)
    k = min(20, matrix.shape[0]) if k is None else k
    if not quiet:
        _announce(matrix, k)
    spectrum = compute(matrix, k)
    console.print(_facts(spectrum))
    if spectrum.rank == 0:
        console.print("D = 0: the gradients of all samples agree to rounding. There is nothing to draw.")
        return
    console.print(_table(spectrum))
    draw(spectrum, output)
    # Not through the console, which would break a long path.
    print(output.resolve())


def _announce(matrix: DiffusionMatrix, k: int) -> None:
    try:
        passes, seconds, size = matrix.estimate(k)
    except TypeError:  # a loader without a length, which the first pass finds out
        matrix.trace()
        passes, seconds, size = matrix.estimate(k)
    if seconds >= LONG:
        more = ", more where eigenvalues are close" if passes > 2 else ""
        Console(stderr=True, highlight=False).print(
            f"d = {matrix.shape[0]:,}: about {passes} passes over the data in {timedelta(seconds=round(seconds))}"
            f" (h:mm:ss){more}, and {size / 2**20:,.0f} MiB of memory",
            soft_wrap=True,
        )


def _facts(spectrum: Spectrum) -> Table:
    bound = min(spectrum.samples - 1, spectrum.dimension)
    largest = spectrum.eigenvalues[0] if len(spectrum.eigenvalues) else 0
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, value in {
        "d": f"{spectrum.dimension:,}",
        "N": f"{spectrum.samples:,}",
        "trace": f"{spectrum.trace:.6g}",
        "lambda_max": f"{largest:.6g}",
        "rank": f"at most {bound:,}" if spectrum.rank is None else f"{spectrum.rank:,} of at most {bound:,}",
    }.items():
        table.add_row(name, value)
    return table


def _table(spectrum: Spectrum) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in ("index", "eigenvalue", "share of the\ntrace, %", "cumulative\nshare, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, (value, share) in enumerate(zip(spectrum.eigenvalues, spectrum.shares, strict=True), 1):
        table.add_row(str(index), f"{value:.6g}", f"{100 * value / spectrum.trace:.2f}", f"{100 * share:.2f}")
    return table


def draw(spectrum: Spectrum, path: Path) -> None:
    """Write the figure to `path` as PNG: eigenvalues on a log scale, and their cumulative share of the trace."""
    indices = range(1, len(spectrum.eigenvalues) + 1)
    marker = "." if len(indices) < 200 else ""
    figure = Figure(figsize=(9, 7), layout="constrained")
    values, shares = figure.subplots(2, sharex=True, height_ratios=(1.6, 1))
    values.semilogy(indices, spectrum.eigenvalues, color="#0072B2", marker=marker)
    values.set_ylabel("eigenvalue of D, |gradient|²")
    values.set_title(f"d = {spectrum.dimension:,}, N = {spectrum.samples:,}, tr D = {spectrum.trace:.4g} |gradient|²")
    shares.plot(indices, 100 * spectrum.shares, color="#D55E00", marker=marker)
    shares.set_ylabel("cumulative share\nof the trace, %")
    shares.set_ylim(0, 105)
    shares.set_xlabel("index of the eigenvalue, from the largest")
    shares.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (values, shares):
        axes.grid(alpha=0.3)
    figure.align_ylabels()
    figure.savefig(path, format="png", dpi=120)
