"""A file with the statistics of every sample of a data set, which are recorded batch by batch."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from torch import Tensor

from ..metric import PER_SAMPLE, Stats

_NUMBERS = ("grad_norm", "trace", *PER_SAMPLE)
# A row has 64 bytes, and .npy files a header of a multiple of 64: no row lies in two sectors of a disk.
ROW = np.dtype([("batch_size", "<i8"), *((name, "<f8") for name in _NUMBERS)])


class SampleRecord:
    """A .npy file with a row for each sample of a data set; an existing one is continued.

    Each row is written by one system call, so a process that is killed leaves whole rows.

    Args:
        path: the file; its folder exists.
        size: the number of samples in the data set.

    Raises:
        TypeError, ValueError: for a size that is no positive whole number; ValueError if the file holds something
            else, which is left as it is.
        OSError: if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"size is {size!r}: pass the number of samples in the data set, such as len(dataset)")
        if size < 1:
            raise ValueError(f"size is {size}: pass the number of samples in the data set")
        self._path, self._size = Path(path), size
        # A weak reference to the Stats that were recorded last.
        self._recorded: Callable[[], Stats | None] = lambda: None
        if not self._path.exists():
            self._create()
        # The header, which tells what is in the file.
        self._header = self._checked_header()

    def _create(self) -> None:
        """A file without numbers, which is there whole or not at all."""
        rows = np.zeros(self._size, ROW)
        for name in _NUMBERS:
            rows[name] = math.nan
        with NamedTemporaryFile(dir=self._path.parent, prefix=f"{self._path.name}.", delete=False) as file:
            try:
                np.save(file, rows)
                file.flush()
                os.replace(file.name, self._path)
            except BaseException:
                os.unlink(file.name)
                raise

    def _checked_header(self) -> bytes:
        """The header of the file; ValueError if there is something else in the file."""
        with FileIO(self._path) as file:
            try:
                is_own = np.lib.format.read_magic(file) == (1, 0) and (
                    np.lib.format.read_array_header_1_0(file) == ((self._size,), False, ROW)
                )
            except ValueError:
                is_own = False
            end = file.tell()
            if not is_own or os.fstat(file.fileno()).st_size != end + self._size * ROW.itemsize:
                raise ValueError(
                    f"{self._path} is not the record of a data set of {self._size} samples: pass a new file"
                )
            file.seek(0)
            return file.read(end)

    def write(self, index: Tensor | np.ndarray | Sequence[int], stats: Stats) -> None:
        """Write the statistics of a batch to the rows `index`, (B,), over what was there; waits for the device.

        Raises:
            RuntimeError: if these statistics are recorded already.
            TypeError, ValueError: for indices that are not one for each sample, or outside of the data set.
            OSError: if the file cannot be written. All rows are whole then, and the call may be repeated.
        """
        if stats is self._recorded():
            raise RuntimeError(
                "no backward since the last record(index), whose numbers these rows would repeat: call it once after"
                " each loss.backward(), and after the block of handle.accumulate() or after handle.write()"
            )
        places = self._checked(index, stats.batch_size)
        rows = np.empty(stats.batch_size, ROW)
        rows["batch_size"] = stats.batch_size
        for name, values in stats.on_host(*_NUMBERS).items():
            rows[name] = values
        with FileIO(self._path, "r+") as file:
            if file.read(len(self._header)) != self._header:
                raise ValueError(f"{self._path} has been overwritten: call handle.record_to with a new file")
            for row, place in zip(rows, places.tolist(), strict=True):
                os.pwrite(file.fileno(), row.tobytes(), len(self._header) + place * ROW.itemsize)
        self._recorded = weakref.ref(stats)

    def _checked(self, index: Tensor | np.ndarray | Sequence[int], batch_size: int) -> np.ndarray:
        places = index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        if places.dtype.kind not in "iu":
            raise TypeError(f"index is of {places.dtype}: pass the places of samples in the data set, whole numbers")
        if places.shape != (batch_size,):
            raise ValueError(
                f"index has shape {places.shape}, and the last direction is of {batch_size} samples: pass one for each,"
                " in the order of the batch, and of a union in the order of its batches"
            )
        outside = places[(places < 0) | (places >= self._size)]
        if outside.size:
            raise ValueError(f"index has {outside[0]}, outside of a data set of {self._size} samples: count from 0")
        return places
