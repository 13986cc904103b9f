"""The table of the `spectrum` command."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ...diffusion import DiffusionMatrix
from .computation import SpectrumSummary, compute
from .figure import draw

# A computation that will take at least so many seconds is announced.
LONG = 2


def report(matrix: DiffusionMatrix, k: int | None, output: Path, quiet: bool) -> None:
    """Print the facts about D, and write the figure to `output`; `k` is 20 by default, or d where that is less."""
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
    except TypeError:  # the loader does not know its length: the first pass counts the batches
        matrix.trace()
        passes, seconds, size = matrix.estimate(k)
    if seconds >= LONG:
        more = ", more where eigenvalues are close" if passes > 2 else ""
        Console(stderr=True, highlight=False).print(
            f"d = {matrix.shape[0]:,}: about {passes} passes over the data in {timedelta(seconds=round(seconds))}"
            f" (h:mm:ss){more}, and {size / 2**20:,.0f} MiB of memory",
            soft_wrap=True,
        )


def _facts(spectrum: SpectrumSummary) -> Table:
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


def _table(spectrum: SpectrumSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in ("index", "eigenvalue", "share of the\ntrace, %", "cumulative\nshare, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, (value, share) in enumerate(zip(spectrum.eigenvalues, spectrum.shares, strict=True), 1):
        table.add_row(str(index), f"{value:.6g}", f"{100 * value / spectrum.trace:.2f}", f"{100 * share:.2f}")
    return table
