"""A record of a training: the statistics of the diffusion metric in each step, as rows of a CSV file."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Mapping
from copy import copy
from io import FileIO
from numbers import Integral, Real
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .capture import Preconditioner
from .metric import Stats
from .metric.noise import NoiseScale
from .metric.recorded import PREFIX, RECORDED

# From running means over the rows.
NOISE = ("noise_scale", "grad_snr")
QUANTILES = ("weight_min", "weight_25", "weight_median", "weight_75", "weight_max")
COLUMNS = ("step", "batch_size", "loss", *RECORDED, *NOISE, *QUANTILES)
_LARGEST_STEP = 2**53  # of those that a float64 tells from their neighbours
_HEADER = (",".join(COLUMNS) + "\n").encode()


class Writer(Protocol):
    """The method of a `torch.utils.tensorboard.SummaryWriter` that a `Monitor` calls."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Record one number."""
        ...


class Monitor:
    """Writes `Stats` to a CSV file, a row per step; a context manager that closes it.

    Columns: step, batch_size (B), loss, epsilon (in 1/|gradient|^2), lambda_max, trace and rayleigh (of D, in
    |gradient|^2), cosine (of the angle between direction and gradient), effective_sample_size (in samples), grad_norm,
    direction_norm, negative_weights (how many), noise_scale (the gradient noise scale, in samples), grad_snr (the
    squared norm of the gradient over the variance of its estimate from a batch), and the minimum, quartiles and maximum
    of the weights B w_i, which are 1 for SGD. A cell is empty where there is no number: that of the loss if none was
    given, that of epsilon where the weights come from none, that of lambda_max without the Gramian, and noise_scale and
    grad_snr as long as noise hides the gradient. These two come from running means over about a hundred rows, of
    numerator and denominator, in which small batches count less; for them the loss has to keep its scale. The gradient
    is that of the loss on which `backward` was called, in its scale (sum or mean, times that of a GradScaler).

    Each row is appended by one unbuffered write, so a run that is killed leaves whole rows. If a crash of the machine
    leaves a part of the last row, it is dropped when the file is opened again. An existing file is continued.

    Args:
        handle: of the captured model, from `rgd_ext.precondition`, `rgd_ext.observe` or `RGD(...).preconditioner`.
        path: the file; its folder exists.
        writer: also gets every number, as "rgd/" and the name of the column. The caller closes it.

    Raises:
        TypeError: if `handle` is no `Preconditioner`, or `writer` is a class or has no `add_scalar`.
        ValueError: if the file holds something else, which is left as it is.
        OSError: if the file cannot be opened.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = rgd_ext.RGD(model, lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with rgd_ext.Monitor(optimizer.preconditioner, f"{folder}/run.csv") as monitor:
        ...         loss = model(torch.randn(16, 4)).square().mean()
        ...         loss.backward()
        ...         monitor.log(loss)
        ...     rgd_ext.monitor.read(f"{folder}/run.csv")["batch_size"]
        array([16.])
    """

    def __init__(self, handle: Preconditioner, path: str | os.PathLike[str], *, writer: Writer | None = None) -> None:
        if not isinstance(handle, Preconditioner):
            raise TypeError(
                f"handle is of type {type(handle).__name__}: pass what rgd_ext.precondition(model) returned, or"
                " optimizer.preconditioner of an RGD(model, ...)"
            )
        if isinstance(writer, type):
            raise TypeError(f"writer is the class {writer.__name__}: pass an instance, {writer.__name__}(...)")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer is of type {type(writer).__name__}, without add_scalar: pass a SummaryWriter")
        self.handle, self.path, self.writer = handle, Path(path), writer
        # A weak reference to the Stats of the last row.
        self._logged: Callable[[], Stats | None] = lambda: None
        self._noise = NoiseScale()
        self._file = FileIO(self.path, "a+")
        try:
            self._step = self._resume()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def log(self, loss: float | Tensor | None = None, step: int | None = None) -> None:
        """Append the row of the last backward; waits for the device once.

        Args:
            loss: of this step: a number, or a tensor with one element.
            step: the number of the step; by default one more than that of the row before, from 0. Where it does not
                exceed those of earlier rows, as after going back to a checkpoint, the new row takes their place in
                `read` and in plots.

        Raises:
            RuntimeError: if no backward has run since the last row, or ever, or the monitor is closed.
            TypeError, ValueError: for a loss that is not one number, a step that is not a whole one.
            OSError: if the row could not be written; the file is then as before.
        """
        if self._file.closed:
            raise RuntimeError(f"the monitor of {self.path} is closed: log() inside its `with` block")
        stats = self.handle.stats
        if stats is None:
            raise RuntimeError(
                "there was no backward of the captured model yet: call log() after loss.backward(), or after"
                " handle.write() if the handle defers"
            )
        if stats is self._logged():
            raise RuntimeError(
                f"no backward since the row of step {self._step - 1}, whose numbers this row would repeat: call log()"
                " once after each loss.backward(), and after the block of handle.accumulate() or"
                " after handle.write()"
            )
        if not isinstance(step, Integral | None):
            raise TypeError(f"step is {step!r}: pass a whole number")
        step = self._step if step is None else int(step)
        if abs(step) > _LARGEST_STEP:
            raise ValueError(f"step is {str(step)[:20]}...: pass a whole number of at most {_LARGEST_STEP}")
        values = {"batch_size": stats.batch_size, **_measure(stats, loss)}
        noise = copy(self._noise) if step >= self._step else _noise_of(read(self.path), step)
        noise.add(*_of_noise(values))
        found = zip(NOISE, (noise.value, noise.signal_to_noise), strict=True)
        values |= {name: value for name, value in found if value is not None}
        self._append(",".join([str(step), *(_cell(values.get(name)) for name in COLUMNS[1:])]) + "\n")
        self._step, self._logged, self._noise = step + 1, weakref.ref(stats), noise
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(PREFIX + name, value, step)

    def _append(self, row: str) -> None:
        line, size = row.encode(), os.fstat(self._file.fileno()).st_size
        if self._file.write(line) != len(line):
            self._file.truncate(size)
            raise OSError(f"only a part of a row fitted into {self.path}, and was taken back: make room on the disk")

    def _resume(self) -> int:
        """Write the header of an empty file, or drop a torn last line; returns the step after the last in the file."""
        self._file.seek(0)
        content = self._file.read()
        if _HEADER.startswith(content):
            self._file.truncate(0)
            self._append(_HEADER.decode())
            return 0
        if not content.startswith(_HEADER):
            first = content.partition(b"\n")[0].decode(errors="replace")
            raise ValueError(f"{self.path} has other columns, {first[:200]!r}: pass a new file")
        whole = content[: content.rindex(b"\n") + 1]
        step = 0
        if whole != _HEADER:
            run = read(self.path)
            step = int(run["step"][-1]) + 1
            self._noise = _noise_of(run, step)
        self._file.truncate(len(whole))
        return step


def _measure(stats: Stats, loss: float | Tensor | None) -> dict[str, float]:
    """The values of the columns that have one, read from the device in one transfer."""
    weights = stats.weights * stats.batch_size
    scalars = {name: getattr(stats, attribute) for name, attribute in RECORDED.items()}
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"loss is of shape {tuple(loss.shape)}: pass the loss of the step, one number")
        if loss.is_complex():
            raise TypeError(f"loss is of {loss.dtype}: pass a real number")
        scalars["loss"] = loss.detach()
    elif not isinstance(loss, Real | None):
        raise TypeError(f"loss is of type {type(loss).__name__}: pass a number or a tensor with one element")
    scalars = {name: value.to(weights).reshape(()) for name, value in scalars.items() if value is not None}
    # Made on the device, since the host would wait for the copy of a list.
    levels = torch.linspace(0, 1, len(QUANTILES), dtype=weights.dtype, device=weights.device)
    values = torch.cat([torch.stack([*scalars.values()]), weights.quantile(levels)]).tolist()
    measured = dict(zip([*scalars, *QUANTILES], values, strict=True))
    return {"loss": float(loss), **measured} if isinstance(loss, Real) else measured


def _of_noise(values: Mapping[str, float]) -> tuple[float, float, float]:
    """What a row contributes to the noise scale: B, |g|^2 and tr D."""
    return values["batch_size"], values["grad_norm"] ** 2, values["trace"]


def _noise_of(run: dict[str, np.ndarray], step: float) -> NoiseScale:
    """The noise scale from the rows of a file that come before a row of this step."""
    found = NoiseScale()
    for cells in zip(*run.values(), strict=True):
        row = dict(zip(run, cells, strict=True))
        if row["step"] < step:
            found.add(*_of_noise(row))
    return found


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"  # nine digits hold a float32


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The columns of a file that `Monitor` wrote, or is writing: float64 arrays, NaN where a cell is empty.

    A torn last line is left out, and so are rows that a later row with the same or a smaller step replaces.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if columns are missing, a row is damaged, or there is none.
    """
    header, *lines = Path(path).read_bytes().decode(errors="replace").split("\n")[:-1] or [""]
    names = header.split(",")
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}: pass a file that rgd_ext.Monitor wrote")
    step = names.index("step")
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 2):
        try:
            row = [float(cell or "nan") for cell in line.split(",")]
        except ValueError:
            row = []
        if len(row) != len(names) or not math.isfinite(row[step]):
            raise ValueError(f"line {number} of {path} is damaged, {line[:200]!r}: delete it")
        while rows and rows[-1][step] >= row[step]:
            rows.pop()
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no row yet: plot it after the first step")
    return dict(zip(names, np.array(rows).T, strict=True))
