"""The memory a call takes at its peak.

Counted are tensors: what torch's allocator hands out, gradients left in `.grad` included. On the CPU scratch memory of
oneDNN and MKL is not, and neither is what malloc keeps beside.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate

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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))
