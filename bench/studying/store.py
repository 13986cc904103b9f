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
from typing import Any, BinaryIO

from .question import Config, Finished, Line, key_of

DIGITS = 6  # significant ones of the numbers in an outcome


class Store:
    """The finished runs of a question in `folder`, shared by all processes that run it.

    A line is written only when its run is finished, and a process that is killed while it writes leaves the beginning
    of a line, which is neither read nor kept.
    """

    def __init__(self, folder: Path, question: str) -> None:
        self.path = folder / f"{question}.jsonl"
        self.finished = Finished()
        self._claims, self._running = folder / f"{question}.lock", folder / "running.lock"
        self._read_to, self._lines = 0, 0

    def refresh(self) -> None:
        """Read the lines that were added since the last time, by any process.

        Raises:
            ValueError: for a line that is no finished run, or if the file was replaced by a shorter one.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._read_to:
                raise ValueError(f"{self.path} has become shorter while the study ran: start the study again")
            file.seek(self._read_to)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        for text in whole.splitlines():
            self._lines += 1
            self.finished.add(_parsed(text, f"{self.path}, line {self._lines}"))
        self._read_to += len(whole)

    def append(self, line: Line) -> None:
        """Write a finished run, and keep it.

        Raises:
            ValueError: if a number is not finite, or the file has something else than lines of the study.
        """
        text = _text(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._claims.open("ab") as file, self._running.open("ab") as running:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except (BlockingIOError, PermissionError):  # which of them is up to the system
                yield False
                return
            fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            self.refresh()
            yield config not in self.finished


def check(line: Line) -> None:
    """Raise ValueError or TypeError if the line cannot be written, as with a number that is not finite."""
    _text(line)


def _text(line: Line) -> str:
    entries = asdict(line)
    return json.dumps(entries | {"outcome": rounded(entries["outcome"])}, allow_nan=False)


def _parsed(text: bytes, place: str) -> Line:
    """A line of the file, which messages call `place`."""
    try:
        line = Line(**json.loads(text))
        if not all(isinstance(each, dict) for each in (line.config, line.outcome, line.machine)):
            raise TypeError("config, outcome and machine have to be objects")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place} is no finished run ({error}): delete it, and the run is repeated") from error
    return line


def _end_of_last_line(file: BinaryIO) -> int:
    """Where the last whole line of a file that is open for reading ends, in bytes."""
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if content and not content.startswith(b'{"config"'):
        raise ValueError(f"{file.name} is no file of the study, and nothing was written to it: name another folder")
    return end


def rounded(value: Any) -> Any:
    """The value with all floats in it rounded to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
