"""What a device does per second, measured once."""

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

import torch

from .. import ops
from .cost import Rates


@cache
def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of a device, measured once (some 70 ms) and kept in a file, so that later runs choose the same ways.

    The file is rgd_ext/rates.json in the user's folder for caches, `$XDG_CACHE_HOME` or ~/.cache.
    """
    key = f"{_name(device)}, {dtype}, torch {torch.__version__}"
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rgd_ext" / "rates.json"
    except RuntimeError:  # a user without a home
        return _measured(device, dtype)
    known = _read(path)
    if key not in known:
        known[key] = asdict(_measured(device, dtype))
        with suppress(OSError):  # a read-only home: measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(known, indent=1))
            part.replace(path)
    return Rates(**known[key])


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text())
        return {key: asdict(Rates(**values)) for key, values in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing, or not what this release writes
        return {}


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{platform.machine()} {capability}, {threads} threads"


def now(devices: Iterable[torch.device]) -> float:
    """The clock, in seconds, once `devices` have done what they were given."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype) -> Rates:
    # torch.utils.benchmark would bring setuptools and torch's search for nvcc, with its warnings, into every program.
    def seconds(call: Callable, *inputs, **options) -> float:
        def timed() -> float:
            start = now([device])
            for _ in range(2):
                call(*inputs, **options)
            return (now([device]) - start) / 2

        return min(timed() for _ in range(5))

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    size = dtype.itemsize
    call = seconds(ones(1).add_, 0)
    left, right = ones(256, 1024), ones(1024, 512)
    product = 2 * 256 * 1024 * 512 / seconds(torch.mm, left, right, out=ones(256, 512))
    images, grads = ones(8, 32, 16, 16), ones(8, 32, 16, 16)
    operations = 2 * grads.numel() * 32 * 9
    geometry = [3, 3], [1, 1], [1, 1], [1, 1], 1
    convolution = operations / seconds(ops.conv_weight_grads, grads, images, *geometry)
    grads = ones(16, 1 << 20)
    stream = size * grads.numel() / seconds(ops.combine, grads, ones(16))
    grads = ones(64, 1 << 16)
    reading = size * grads.numel() / stream
    gram = 64 * grads.numel() / max(seconds(ops.gram, grads) - reading, reading / 10)
    return Rates(product, convolution, gram, stream, 1 / call)
