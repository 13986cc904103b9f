"""Runs what a question plans, beside other processes that do the same."""

from __future__ import annotations

import time

import torch

from rgd_ext.progress import progress_bars

from ..measuring.environment import machine
from .data import Sources
from .question import Config, Finished, Line, Question, Scope, key_of
from .store import Store, check

WAIT = 1.0  # seconds between looks at what other processes are still running


def work(question: Question, store: Store, scope: Scope, sources: Sources) -> None:
    """Return when every run that the question plans is finished, by this process or by others.

    Raises:
        RuntimeError: if a run fails; the message has its configuration.
    """
    worker = Worker(question, store, sources)
    with Progress(store.path.stem) as progress:
        while pending := _pending(question, store, scope, progress):
            ran = [worker.finish(config, progress) for config in pending]
            if not any(ran):
                progress.wait(len(pending))
                time.sleep(WAIT)


def _pending(question: Question, store: Store, scope: Scope, progress: Progress) -> list[Config]:
    """What is planned now and not finished."""
    store.refresh()
    planned = question.plan(store.finished, scope)
    progress.plan(planned, store.finished)
    return [config for config in planned if config not in store.finished]


class Worker:
    """A process that runs configurations of a question."""

    def __init__(self, question: Question, store: Store, sources: Sources) -> None:
        torch.set_num_threads(1)  # the tensors are too small for a second one, which other processes may use
        self._question, self._store, self._sources = question, store, sources
        self._machine = machine()  # with the commit of the code that is loaded now

    def finish(self, config: Config, progress: Progress) -> bool:
        """Run a configuration and write its line, unless another process does; whether this one did."""
        with self._store.claim(config, self._question.alone) as free:
            if free:
                start = time.perf_counter()
                try:
                    outcome = self._question.run(config, self._sources)
                    line = Line(config, outcome, time.perf_counter() - start, self._machine)
                    check(line)
                except Exception as error:
                    raise RuntimeError(f"the run {config} failed: {error}") from error
                self._store.append(line)
                progress.advance(self._store.finished)
        return free


class Progress:
    """A context manager that shows on standard error how many runs are finished, and the time that is left.

    The time counts what all processes finish, and the runs that are planned so far.
    """

    def __init__(self, name: str) -> None:
        self._bars = progress_bars()
        self._bar = self._bars.add_task(name, total=None)
        self._name, self._start, self._before = name, time.perf_counter(), None
        self._planned: set[str] = set()  # the keys of the configurations
        self._waiting = False

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def plan(self, planned: list[Config], finished: Finished) -> None:
        """These runs are planned."""
        self._planned = set(map(key_of, planned))
        done = self._show(finished)
        self._before = done if self._before is None else self._before

    def advance(self, finished: Finished) -> None:
        """This process has finished a run."""
        done, total = self._show(finished), len(self._planned)
        if not self._bars.console.is_terminal:
            left = (time.perf_counter() - self._start) / (done - self._before) * (total - done)
            self._bars.console.print(f"{self._name}: {done} of {total} runs, {left / 60:.1f} minutes left")

    def wait(self, count: int) -> None:
        """So many runs are left, and other processes are running all of them."""
        if not self._waiting:
            self._bars.console.print(f"{self._name}: waiting for {count} runs of other processes")
        self._waiting = True

    def _show(self, finished: Finished) -> int:
        """Show how many runs are finished, and return it."""
        done = len(self._planned & finished.keys())
        self._bars.update(self._bar, completed=done, total=len(self._planned))
        return done
