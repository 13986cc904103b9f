"""What torch.compile makes of a call: its graphs, its graph breaks, and which compiled graphs run.

Dynamo and Inductor are imported where they are needed: all benchmarks import this module, and should not run with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Compilation:
    """What was compiled: the number of graphs, and of the graph breaks for each reason."""

    graphs: int = 0
    breaks: dict[str, int] = field(default_factory=dict)


@contextmanager
def compiling() -> Iterator[Compilation]:
    """Within, everything is compiled anew; the report is complete afterwards.

    Dynamo keeps what it has found of a code object. Without a reset, an arm is not compiled at all if an arm before it
    has had its graph breaks in the same code. Nothing of the compilation is read from a cache, so that its time counts.
    """
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    counters.clear()
    found = Compilation()
    with fresh_cache():
        yield found
    found.graphs = counters["stats"]["unique_graphs"]
    for reason, count in counters["graph_break"].items():
        short = _short(reason)
        found.breaks[short] = found.breaks.get(short, 0) + count


def _short(reason: str) -> str:
    """The first line of a reason, or the message of whoever asked for the graph break."""
    first, _, rest = reason.partition("\n")
    _, _, message = rest.partition("Message: ")
    return message.partition("\n")[0] or first


def graphs_run(call: Callable[[], object]) -> int:
    """The number of compiled graphs with a backward that a call runs."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it prints a line for every profile
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        call()
    return sum(average.count for average in recorded.key_averages() if average.key == "CompiledFunction")
