"""Times of the device on CUDA, between events: of CUDA graphs that call an arm on several buffers in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from .timing import Clock, call_each, host_clock

# The device first waits for about a millisecond. Meanwhile the host enqueues what is timed, so that the measured time
# does not include launches.
HEAD_START_CYCLES = 2_000_000

Timer = Callable[[Callable[[object], object], Sequence[object]], tuple[Clock, Exception | None]]


def number_of_buffers(size: int, device: str) -> int:
    """How many buffers of `size` bytes to use in turn: on CUDA four times the L2 cache, so that no read hits it."""
    if device == "cpu":
        return 1
    return math.ceil(4 * torch.cuda.get_device_properties().L2_cache_size / size)


def device_clock(run: Callable[[], object], calls: int) -> Clock:
    """A clock that times `run`, which makes `calls` calls, on the device, and returns milliseconds per call."""
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
    """Captures arms into CUDA graphs. Their results are not kept, so that all graphs can share one memory pool."""

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
        """The clock of a graph; where `call` cannot be captured, that of calls from Python, and the exception."""
        try:
            return self.clock(call, inputs), None
        except Exception as problem:
            return device_clock(partial(call_each, call, inputs), len(inputs)), problem


def timer(device: str) -> Timer:
    """What makes the clock of a call on each of several inputs: by graphs on CUDA, by the host's clock on the CPU."""
    return Graphs().clock_or_calls if device == "cuda" else _host_clock


def _host_clock(call: Callable[[object], object], inputs: Sequence[object]) -> tuple[Clock, None]:
    return host_clock(partial(call_each, call, inputs), len(inputs)), None


def copy_clock(size: int) -> Clock:
    """The clock of a copy on the device that reads `size` bytes and writes as many."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return device_clock(lambda: target.copy_(source), 1)
