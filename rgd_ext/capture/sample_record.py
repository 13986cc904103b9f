"""A file with the statistics of every sample of a data set, which are recorded batch by batch."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from tokenize import TokenError
from uuid import uuid4

import numpy as np
from torch import Tensor

from ..metric import Stats, on_host

_NUMBERS = ("grad_norm", "trace", "sample_norms", "alignments", "squared_norms", "aligned", "weights")
# A row has 64 bytes, and .npy files have a header of a multiple of 64: no row lies in two sectors of a disk.
ROW = np.dtype([("batch_size", "<i8"), *((name, "<f8") for name in _NUMBERS)])


class SampleRecord:
    """A .npy file with a row for each sample of a data set; an existing one is continued.

    Each row is written by one system call, so a process that is killed leaves whole rows.

    Args:
        path: the file; its folder exists.
        size: the number of samples in the data set.

    Raises:
        TypeError, ValueError: for a size that is not a positive integer; ValueError if the file holds something else,
            which is left as it is.
        OSError: if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        remedy = f"size is {size!r}: pass the number of samples in the data set, such as len(dataset)"
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(remedy)
        if size < 1:
            raise ValueError(remedy)
        self._path, self._size = Path(path).absolute(), int(size)
        # A weak reference to the Stats that were recorded last.
        self._recorded: Callable[[], Stats | None] = lambda: None
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self._path.parent}: make it first")
        if not self._path.exists():
            self._create()
        with FileIO(self._path, "r+") as file:
            # The header, which tells what is in the file.
            self._header = self._checked_header(file)

    def _create(self) -> None:
        """A file without numbers, which is there whole or not at all, unless another process has just made it."""
        rows = np.zeros(self._size, ROW)
        for name in _NUMBERS:
            rows[name] = math.nan
        part = self._path.with_name(f"{self._path.name}.{uuid4().hex}")
        try:
            with part.open("wb") as file:
                np.save(file, rows)
            try:
                os.link(part, self._path)
            except FileExistsError:
                pass
            except OSError:  # where there are no hard links
                part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)

    def _checked_header(self, file: FileIO) -> bytes:
        """The header of the file; ValueError if there is something else in the file."""
        try:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except (ValueError, SyntaxError, TokenError):  # what numpy raises for other headers
            raise ValueError(f"{self._path} is not a .npy file of a record: pass a new file") from None
        end = file.tell()
        if dtype != ROW or len(shape) != 1 or _size(file) != end + shape[0] * ROW.itemsize:
            raise ValueError(f"{self._path} holds an array of other columns, or a part of one: pass a new file")
        if shape != (self._size,):
            raise ValueError(
                f"{self._path} is a record of {shape[0]} samples, and size is {self._size}: pass a new file, or the"
                " size of its data set"
            )
        file.seek(0)
        return file.read(end)

    def write(self, index: Tensor | np.ndarray | Sequence[int], stats: Stats, own: slice) -> None:
        """Replace the rows `index` by the statistics of some of the samples of a batch; waits for the device.

        Args:
            index: the places of these samples in the file.
            stats: of the batch.
            own: the places of these samples in the batch.

        Raises:
            RuntimeError: if these statistics are recorded already.
            TypeError, ValueError: for indices that are not one for each sample, or outside of the data set; ValueError
                if somebody has put something else in the place of the file.
            OSError: if the file cannot be written. All rows are whole then, and the call may be repeated.
        """
        if stats is self._recorded():
            raise RuntimeError(
                "no backward since the last record(index), whose numbers these rows would repeat: call it once after"
                " each loss.backward(), and after the block of handle.accumulate() or after handle.write()"
            )
        places = self._checked(index, own.stop - own.start)
        rows = np.empty(len(places), ROW)
        rows["batch_size"] = stats.batch_size
        for name, values in on_host(stats, *_NUMBERS).items():
            rows[name] = values[own] if isinstance(values, np.ndarray) else values
        with FileIO(self._path, "r+") as file:
            whole = len(self._header) + self._size * ROW.itemsize
            if file.read(len(self._header)) != self._header or _size(file) != whole:
                raise ValueError(f"{self._path} has been overwritten: call handle.record_to with a new file")
            for row, place in zip(rows, places.tolist(), strict=True):
                self._replace(file.fileno(), place, row.tobytes())
        self._recorded = weakref.ref(stats)

    def _replace(self, file: int, place: int, row: bytes) -> None:
        """Write a row, or leave the one that is there and raise OSError."""
        offset = len(self._header) + place * ROW.itemsize
        before = os.pread(file, ROW.itemsize, offset)
        if os.pwrite(file, row, offset) != ROW.itemsize:
            os.pwrite(file, before, offset)
            raise OSError(f"only a part of a row fitted into {self._path}, and was taken back: make room on the disk")

    def _checked(self, index: Tensor | np.ndarray | Sequence[int], batch_size: int) -> np.ndarray:
        remedy = (
            f"pass the index in the data set of each of the {batch_size} samples of the last direction, integers in the"
            " order of the batch; for a union of batches, one batch after another"
        )
        try:
            places = index.tolist() if isinstance(index, Tensor) else index
            places = np.asarray(places)
        except (ValueError, RuntimeError, TypeError) as error:  # ragged lists, and tensors without numbers
            raise TypeError(f"index is {type(index).__name__} that holds no array ({error}): {remedy}") from None
        if places.shape != (batch_size,):
            raise ValueError(f"index has shape {places.shape}: {remedy}")
        if places.size and places.dtype.kind not in "iu":
            raise TypeError(f"index is of {places.dtype}: {remedy}")
        outside = places[(places < 0) | (places >= self._size)]
        if outside.size:
            raise ValueError(f"index has {outside[0]}, outside of a data set of {self._size} samples: count from 0")
        return places


def _size(file: FileIO) -> int:
    return os.fstat(file.fileno()).st_size
