"""The cost of collectives: each message takes a latency, and each byte the time of a link.

All links are alike, send and receive at the same time, and carry one message at once. With n bytes and R ranks, a
reduce-scatter or an all-gather sends n (R - 1) / R bytes from every rank, by either algorithm. An all-reduce is one
after the other. The algorithms differ in the messages that wait for each other:

ring    R - 1, each of n / R bytes from a rank to the next one
tree    log2 R, rounded up: pairs of ranks exchange n / 2, n / 4, ... (recursive halving), or the reverse (doubling).
        NCCL's double binary trees send as many bytes, and their number of messages grows likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Link:
    """The link of a rank: seconds for each message, and bytes per second in each direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """What a collective takes: seconds, bytes that a rank sends, and messages one after the other."""

    seconds: float
    sent: float
    messages: int


@dataclass(frozen=True)
class Network:
    """Ranks with equal links, and how collectives use them."""

    ranks: int
    link: Link
    algorithm: Literal["ring", "tree"] = "ring"

    def all_gather(self, size: float) -> Cost:
        """Every rank has an R-th of `size` bytes, and gets the others."""
        return self._cost(size, 1)

    def reduce_scatter(self, size: float) -> Cost:
        """Every rank has `size` bytes, and gets an R-th of their sum."""
        return self._cost(size, 1)

    def all_reduce(self, size: float) -> Cost:
        """Every rank has `size` bytes, and gets their sum."""
        return self._cost(size, 2)

    def _cost(self, size: float, passes: int) -> Cost:
        steps = self.ranks - 1 if self.algorithm == "ring" else (self.ranks - 1).bit_length()
        messages, sent = passes * steps, passes * size * (self.ranks - 1) / self.ranks
        return Cost(messages * self.link.latency + sent / self.link.bandwidth, sent, messages)
