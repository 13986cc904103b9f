"""Device time on CUDA: graphs replayed over rotating buffers, between events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from .measure import Clock, call_each

# About a millisecond, in which the host enqueues what is timed, so that no launch is in the measured time.
HEAD_START_CYCLES = 2_000_000


def number_of_buffers(size: int) -> int:
    """How many buffers of `size` bytes together are four times the L2 cache, so that each read of one is cold."""
    return math.ceil(4 * torch.cuda.get_device_properties().L2_cache_size / size)


def device_clock(run: Callable[[], object], calls: int) -> Clock:
    """What runs `run`, which makes `calls` calls, and returns milliseconds per call on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    return sample


class Graphs:
    """Captures arms into CUDA graphs that share one memory pool: their results are not kept, so none needs its own."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def clock(self, call: Callable[[object], object], inputs: Sequence[object]) -> Clock:
        """Device time of one call: a replay makes one call on each of `inputs`."""
        run = partial(call_each, call, inputs)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            run()
        return device_clock(graph.replay, len(inputs))

    def clock_or_calls(
        self, call: Callable[[object], object], inputs: Sequence[object]
    ) -> tuple[Clock, Exception | None]:
        """`clock`, or that of calls from Python with the exception that keeps them from being captured."""
        try:
            return self.clock(call, inputs), None
        except Exception as problem:
            return device_clock(partial(call_each, call, inputs), len(inputs)), problem


def copy_clock(size: int) -> Clock:
    """Time of a device-to-device copy that reads `size` bytes and writes as many."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return device_clock(lambda: target.copy_(source), 1)
