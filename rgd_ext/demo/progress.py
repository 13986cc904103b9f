"""Progress of the demo: two bars on a terminal, a line for each finished training elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Trials:
    """A context manager that follows `count` trainings of `epochs` epochs each, on standard error."""

    def __init__(self, count: int, epochs: int) -> None:
        self.console = Console(stderr=True)
        self.count, self.epochs, self.done = count, epochs, 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.overall = self.bars.add_task("all trainings (epochs)", total=count * epochs)
        self.current = self.bars.add_task("", total=epochs)

    def __enter__(self) -> Trials:
        self.bars.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bars.stop()

    def begin(self, name: str) -> None:
        """The training called `name` begins."""
        self.name, self.start = name, time.perf_counter()
        self.bars.reset(self.current, description=name)

    def advance(self) -> None:
        """An epoch of it has ended."""
        self.bars.advance(self.overall)
        self.bars.advance(self.current)

    def end(self) -> None:
        """It has ended."""
        self.done += 1
        if not self.console.is_terminal:
            seconds = time.perf_counter() - self.start
            self.console.print(f"{self.done}/{self.count} {self.name}: {seconds:.1f} s", highlight=False)
