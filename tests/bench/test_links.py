"""The cost of a collective is that of its messages, which are simulated one by one with the numbers that they carry."""

import pytest

from bench.simulating.links import Link, Network


class Ranks:
    """Ranks that exchange messages one by one. Each has a clock, and R chunks of numbers to be summed over ranks."""

    def __init__(self, count, link, chunk):
        self.count, self.link, self.chunk = count, link, chunk
        self.values = [[(rank + 1) * 10**index for index in range(count)] for rank in range(count)]
        self.clocks, self.sent, self.messages = [0.0] * count, [0] * count, [0] * count

    def exchange(self, target, chunks, add):
        """Each rank sends chunks to a target, which adds or copies them; a message waits for both."""
        before, clocks = [list(values) for values in self.values], list(self.clocks)
        for rank in range(self.count):
            other, part = target(rank), chunks(rank)
            for index in part:
                self.values[other][index] = before[rank][index] + (before[other][index] if add else 0)
            seconds = self.link.latency + len(part) * self.chunk / self.link.bandwidth
            self.clocks[other] = max(clocks[rank], clocks[other]) + seconds
            self.sent[rank] += len(part) * self.chunk
            self.messages[rank] += 1

    def reduce_scatter(self, algorithm):
        if algorithm == "ring":
            for step in range(self.count - 1):
                self.exchange(lambda r: (r + 1) % self.count, lambda r, s=step: [(r - s) % self.count], add=True)
        for bit in reversed(self.bits(algorithm)):
            self.exchange(lambda r, b=bit: r ^ b, lambda r, b=bit: self.alike(r ^ b, b), add=True)

    def all_gather(self, algorithm):
        if algorithm == "ring":
            for step in range(self.count - 1):
                self.exchange(lambda r: (r + 1) % self.count, lambda r, s=step: [(r + 1 - s) % self.count], add=False)
        for bit in self.bits(algorithm):
            self.exchange(lambda r, b=bit: r ^ b, lambda r, b=bit: self.alike(r, b), add=False)

    def bits(self, algorithm):
        return [2**k for k in range(self.count.bit_length() - 1)] if algorithm == "tree" else []

    def alike(self, rank, bit):
        """The chunks whose number agrees with that of the rank from this bit on."""
        return [index for index in range(self.count) if index // bit == rank // bit]


@pytest.mark.parametrize(
    ("algorithm", "count"), [("ring", 2), ("ring", 3), ("ring", 8), ("tree", 2), ("tree", 4), ("tree", 16)]
)
@pytest.mark.parametrize("collective", ["reduce_scatter", "all_gather", "all_reduce"])
def test_cost_is_that_of_messages_one_by_one(algorithm, count, collective):
    link, chunk = Link(latency=0.25, bandwidth=100.0), 60
    ranks = Ranks(count, link, chunk)
    if collective != "all_gather":
        ranks.reduce_scatter(algorithm)
    if collective != "reduce_scatter":
        ranks.all_gather(algorithm)
    if collective == "all_reduce":
        assert ranks.values == [[sum(range(count + 1)) * 10**index for index in range(count)]] * count
    cost = getattr(Network(count, link, algorithm), collective)(chunk * count)
    assert ranks.clocks == pytest.approx([cost.seconds] * count)
    assert ranks.sent == pytest.approx([cost.sent] * count)
    assert ranks.messages == [cost.messages] * count


def test_one_rank_sends_nothing():
    for algorithm in ("ring", "tree"):
        cost = Network(1, Link(1.0, 1.0), algorithm).all_reduce(100)
        assert (cost.seconds, cost.sent, cost.messages) == (0, 0, 0)
