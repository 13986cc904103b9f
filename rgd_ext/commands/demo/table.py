"""The table of the demo: the accuracy and the time of each optimizer."""

from __future__ import annotations

import statistics

from rich import box
from rich.table import Table

from .training import History


def summary(results: dict[tuple[str, str], list[dict[str, History]]]) -> Table:
    """A row for each optimizer, in a section for each pair (labels, model).

    Args:
        results: for each pair (labels, model) and each seed, the histories of all optimizers by name.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("optimizer", no_wrap=True)
    for heading in ("test\naccuracy, %", "train\naccuracy, %", "ms per\nstep", "ratio\nto SGD"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (setting, model), trials in results.items():
        sgd = _milliseconds([histories["SGD"] for histories in trials])
        table.add_row(f"[bold]{model}, {setting}[/bold]")
        for name in trials[0]:
            histories = [trial[name] for trial in trials]
            milliseconds = _milliseconds(histories)
            table.add_row(
                f"  {name}",
                _spread([history.test_accuracies[-1] for history in histories]),
                _spread([history.train_accuracy for history in histories]),
                f"{milliseconds:.2f}",
                f"{milliseconds / sgd:.2f}",
            )
        table.add_section()
    return table


def _milliseconds(histories: list[History]) -> float:
    return 1e3 * statistics.median([seconds for history in histories for seconds in history.seconds])


def _spread(fractions: list[float]) -> str:
    mean = f"{100 * statistics.mean(fractions):.1f}"
    return f"{mean} ± {100 * statistics.stdev(fractions):.1f}" if len(fractions) > 1 else mean
