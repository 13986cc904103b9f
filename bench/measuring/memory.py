"""The memory that a call takes at its peak.

All tensors are counted, which includes gradients that a call leaves in `.grad`. On the CPU, scratch memory of oneDNN
and MKL is not counted, and neither is memory that malloc keeps after it was freed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def extra_memory(call: Callable[[], object], device: str) -> int:
    """Bytes that a call has allocated at its peak.

    The call should not free tensors from before it: on CUDA these would lower the peak, on the CPU they do not.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it prints a line for every profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
    live, total, peak = {}, 0, 0
    for address, size in _allocations(recorded.profiler.kineto_results.experimental_event_tree()):
        if size > 0:
            live[address] = size
            total += size
        else:  # for a tensor from before the call, torch reports the size of whatever it last saw at that address
            total -= live.pop(address, 0)
        peak = max(peak, total)
    return peak


@contextmanager
def limited_memory(device: str, share: float = 0.8) -> Iterator[None]:
    """Within, the process can allocate at most this share of the machine's free memory (on Linux).

    An arm that needs more raises RuntimeError; without the limit, the system would kill the whole benchmark. There is
    no limit on CUDA, which reserves much more address space than it uses.
    """
    if device == "cuda" or not Path("/proc/meminfo").exists():
        yield
        return
    import resource

    # Return to the system what malloc keeps from earlier arms. The addresses stay counted as the process's data.
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


def _allocations(tree: list) -> list[tuple[int, int]]:
    """Addresses and sizes of what was allocated and freed, in order; the sizes of what was freed are negative."""
    memory = (event for event in _events(tree) if event.name == "[memory]")
    fields = (event.extra_fields for event in sorted(memory, key=lambda event: event.start_time_ns))
    return [(each.ptr, each.alloc_size) for each in fields]


def _events(tree: list) -> Iterator:
    """All events of a profile, those within others too."""
    for event in tree:
        yield event
        yield from _events(event.children)
