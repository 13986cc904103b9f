"""The measured latency and bandwidth of the link between processes."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import distributed

from ..simulating.links import Link, Network
from .clocks import clock, slowest
from .processes import Member

SMALL, LARGE = 8, 25 << 20  # bytes; a bucket is as large
REPEATS = 10
CALLS = {SMALL: 20, LARGE: 1}


def measured_link(member: Member) -> Link:
    """The link with which a ring of the processes takes as long as their all-reduces of a small and a large tensor.

    Whatever algorithm the backend has: the link is that of the ring in the simulation.
    """
    return link_of(member.size, _all_reduce(member, SMALL), _all_reduce(member, LARGE))


def link_of(ranks: int, small: float, large: float) -> Link:
    """The link of a ring whose all-reduces of SMALL and LARGE bytes take so many seconds."""
    ring = Network(ranks, Link(0, 1)).all_reduce(LARGE)
    more = max(large - small, 1e-9)  # a disturbance of the machine may hide it
    return Link(small / ring.messages, ring.sent / more)


def _all_reduce(member: Member, size: int) -> float:
    """Seconds of an all-reduce of so many bytes, the median."""
    tensor = torch.zeros(size // 4, device=member.device)
    timed = slowest(member, clock(member, partial(distributed.all_reduce, tensor), CALLS[size]))
    return statistics.median(timed() for _ in range(REPEATS)) / 1e3
