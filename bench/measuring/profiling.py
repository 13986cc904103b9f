"""A profile of one call by torch.profiler: its kernel launches, and the kernels that take the most time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

ROWS = 15


def profiled(call: Callable[[], object], device: str) -> tuple[int, str]:
    """The number of kernel launches in a call, and a table of the operators that take the most time on the device."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, acc_events=True) as recorded:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    averages = recorded.key_averages()
    # The driver's and the runtime's calls: cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernel, cuLaunchKernelEx.
    launches = sum(average.count for average in averages if "LaunchKernel" in average.key)
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return launches, averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
