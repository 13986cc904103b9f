"""The rates of a device, which are measured once."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import ops
from .._binary import build_info
from .cost import Rates

# To be changed with how rates are measured: those that a file has from before are not comparable.
_VERSION = 2


@cache
def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a device for numbers of `dtype`.

    They are measured once, in some 0.1 s, and kept in a file, so that later runs choose the same strategies. The file
    is rgd_ext/rates.json in the user's folder for caches, `$XDG_CACHE_HOME` or ~/.cache.
    """
    kernels = build_info()["cuda" if device.type == "cuda" else "compiled"]
    key = f"{_name(device)}, {dtype}, torch {torch.__version__}, kernels {kernels}, version {_VERSION}"
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rgd_ext" / "rates.json"
    except RuntimeError:  # a user without a home
        return _of_real_tensors(device, dtype)
    known = _read(path)
    if key not in known:
        known[key] = asdict(_of_real_tensors(device, dtype))
        with suppress(OSError):  # with a read-only home they are measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(known, indent=1))
            part.replace(path)
    return Rates(**known[key])


def _of_real_tensors(device: torch.device, dtype: torch.dtype) -> Rates:
    # Computations on fake tensors would take no time.
    with _disable_current_modes():
        return _measured(device, dtype)


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text())
        return {key: asdict(Rates(**values)) for key, values in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # the file is missing, or not one that this release writes
        return {}


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{platform.machine()} {capability}, {threads} threads"


def now(devices: Iterable[torch.device]) -> float:
    """The time of the clock, in seconds, after `devices` have finished their work."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()


class _Work(NamedTuple):
    """The sizes of the measured calls.

    Attributes:
        product: the sizes m, k and n of a product of matrices.
        convolution: the numbers of samples, of channels, and of places along a side.
        stream, gram: the shapes of gradients.
        calls, seconds: at least this many calls are timed together, and enough of them to take at least this long.
    """

    product: tuple[int, int, int]
    convolution: tuple[int, int, int]
    stream: tuple[int, int]
    gram: tuple[int, int]
    calls: int
    seconds: float


_ON_CPU = _Work((256, 1024, 512), (8, 32, 16), (16, 1 << 20), (64, 1 << 16), calls=2, seconds=0)
# This is enough work for 132 multiprocessors, and more data than a cache of 126 MB holds. Each call takes longer than
# its launch, and all together take much longer than the synchronisation, which takes some 10 us.
_ON_GPU = _Work((2048, 2048, 2048), (64, 64, 16), (64, 1 << 20), (128, 1 << 18), calls=1, seconds=2e-3)


@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype, now: Callable[[Iterable[torch.device]], float] = now) -> Rates:
    # torch.utils.benchmark would bring setuptools and torch's search for nvcc, with its warnings, into every program.
    work = _ON_CPU if device.type == "cpu" else _ON_GPU

    def seconds(call: Callable, *inputs, **options) -> float:
        def timed(calls: int) -> float:
            start = now([device])
            for _ in range(calls):
                call(*inputs, **options)
            return now([device]) - start

        timed(1)  # the first call loads libraries
        calls = work.calls
        while (taken := timed(calls)) < work.seconds:
            calls *= 2
        return min(taken, *(timed(calls) for _ in range(4))) / calls

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    size = dtype.itemsize
    call = seconds(ones(1).add_, 0)
    m, k, n = work.product
    product = 2 * m * k * n / seconds(torch.mm, ones(m, k), ones(k, n), out=ones(m, n))
    samples, channels, side = work.convolution
    images, grads = ones(samples, channels, side, side), ones(samples, channels, side, side)
    operations = 2 * grads.numel() * channels * 9
    geometry = [3, 3], [1, 1], [1, 1], [1, 1], 1
    convolution = operations / seconds(ops.conv_weight_grads, grads, images, *geometry)
    grads = ones(*work.stream)
    stream = size * grads.numel() / seconds(ops.combine, grads, ones(len(grads)))
    grads = ones(*work.gram)
    reading = size * grads.numel() / stream
    gram = len(grads) * grads.numel() / max(seconds(ops.gram, grads) - reading, reading / 10)
    return Rates(product, convolution, gram, stream, 1 / call)
