"""The lines on disk: a file of JSON lines for each question, to which several processes may append."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .question import Config, Finished, Line, key_of

DIGITS = 6  # significant ones of the numbers in an outcome


class Store:
    """The finished runs of a question in `folder`, shared by all processes that run it.

    A line is written only when its run is finished, and a process that is killed while it writes leaves the beginning
    of a line, which is neither read nor kept.
    """

    def __init__(self, folder: Path, question: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{question}.jsonl"
        self.finished = Finished()
        self._claims, self._running = folder / f"{question}.lock", folder / "running.lock"
        self._read_to = 0

    def refresh(self) -> None:
        """Read the lines that were added since the last time, by any process."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self.finished.add(Line(**json.loads(line)))
        self._read_to += len(whole)

    def append(self, line: Line) -> None:
        """Write a finished run, and keep it."""
        entries = asdict(line)
        text = json.dumps(entries | {"outcome": rounded(entries["outcome"])}, allow_nan=False)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(_end_of_last_line(file))
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.refresh()

    @contextmanager
    def claim(self, config: Config, alone: bool = False) -> Iterator[bool]:
        """Whether this process may run the configuration: not if another one is running it, or has finished it.

        If `alone`, wait until no process runs anything, of any question in the folder, and let none start. The system
        ends the claim of a process that is killed.
        """
        # A byte of the file for each configuration: locks need not be within the file, which stays empty.
        place = int.from_bytes(hashlib.sha256(key_of(config).encode()).digest()[:7], "big")
        with self._claims.open("ab") as file, self._running.open("ab") as running:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                yield False
                return
            fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            self.refresh()
            yield config not in self.finished


def _end_of_last_line(file: Any) -> int:
    """Where the last whole line of a file that is open for reading ends, in bytes."""
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def rounded(value: Any) -> Any:
    """The value with all floats in it rounded to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
