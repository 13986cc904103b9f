"""The memory a call takes at its peak.

Counted are tensors: what torch's allocator hands out, gradients left in `.grad` included. On the CPU scratch memory of
oneDNN and MKL is not, and neither is what malloc keeps beside.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def extra_memory(call: Callable[[], object], device: str) -> int:
    """Bytes allocated at the peak of a call beside what is allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it announces every profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


@contextmanager
def limited_memory(device: str, share: float = 0.8) -> Iterator[None]:
    """Within, the process gets this share of the machine's free memory beside its own (on Linux).

    So what wants more raises RuntimeError, instead of having the whole benchmark killed. Not where CUDA is: there
    address space is reserved, not used.
    """
    if device == "cuda" or not Path("/proc/meminfo").exists():
        yield
        return
    import resource

    # What malloc kept of arms before is free then, though it stays among the process's own addresses.
    kept = _kibibytes("/proc/self/status", "VmRSS")
    ctypes.CDLL(None).malloc_trim(0)
    kept -= _kibibytes("/proc/self/status", "VmRSS")
    free, own = _kibibytes("/proc/meminfo", "MemAvailable"), _kibibytes("/proc/self/status", "VmData") - kept
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(own + share * free), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _kibibytes(path: str, name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return int(lines[name].split()[0])
