"""The table of the `noise` command."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .measurement import Noise, Row

WIDEST = 1000


def show(noise: Noise) -> None:
    """Print a row for each module and parameter, with modules in bold and what is inside of them indented."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("module or parameter", no_wrap=True)
    for heading in ("weights", "|gradient|", "noise, tr Σ", "share of\nnoise, %", "noise scale,\nsamples"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in noise.rows:
        table.add_row(
            _title(row),
            f"{row.elements:,}",
            _number(row.squared_grad_norm**0.5 if row.squared_grad_norm > 0 else None),
            _number(row.trace),
            f"{100 * noise.share(row):.1f}",
            _number(row.noise_scale),
        )
    # The table takes what it needs: where the terminal is narrow, or a file, names are not cut off.
    console = Console(highlight=False, width=WIDEST)
    console.print(table)
    console.print(
        f"Batches: {len(noise.batch_sizes)}, samples: {sum(noise.batch_sizes)}. Where a dash stands, noise hides the"
        " gradient in so few samples. Parts may have a larger |gradient| than the whole: it is an unbiased estimate."
    )


def _title(row: Row) -> Text:
    """The last part of the name, as far to the right as the module is deep in the model."""
    *parents, own = ("(model)", *row.name.split(".")) if row.name else ("(model)",)
    return Text("  " * len(parents) + own, "bold" if row.is_module else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
