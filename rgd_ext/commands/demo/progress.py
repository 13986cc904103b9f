"""Progress of the demo: two bars on a terminal, a line for each finished training elsewhere."""

from __future__ import annotations

import time

from ...progress import progress_bars


class Trials:
    """A context manager that follows `count` trainings of `epochs` epochs each, on standard error."""

    def __init__(self, count: int, epochs: int) -> None:
        self.count, self.done = count, 0
        self.bars = progress_bars()
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
        """An epoch of the current training has ended."""
        self.bars.advance(self.overall)
        self.bars.advance(self.current)

    def end(self) -> None:
        """The current training has ended."""
        self.done += 1
        console = self.bars.console
        if not console.is_terminal:
            seconds = time.perf_counter() - self.start
            console.print(f"{self.done}/{self.count} {self.name}: {seconds:.1f} s", highlight=False)
