"""Runs the tasks of a step on ranks that each have one compute stream and one network stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .schedule import Task


@dataclass(frozen=True)
class Timeline:
    """When every rank begins and ends each task: (tasks, ranks), in seconds."""

    tasks: Sequence[Task]
    begins: list[list[float]]
    ends: list[list[float]]

    @property
    def seconds(self) -> float:
        """Of the step, until the last rank has finished."""
        return max(map(max, self.ends))

    @property
    def waiting(self) -> float:
        """Seconds of the step in which the first rank computes nothing."""
        computing = (
            end[0] - begin[0]
            for task, begin, end in zip(self.tasks, self.begins, self.ends, strict=True)
            if not task.network
        )
        return self.seconds - sum(computing)


def simulate(tasks: Sequence[Task], factors: Sequence[Sequence[float]] = ((),), overlap: bool = True) -> Timeline:
    """Run each task as early as its stream and the tasks before it allow, in the order of the list.

    A collective begins when the last rank is there, and ends on all ranks at the same time.

    Args:
        tasks: those of every rank.
        factors: (ranks, tasks), of the seconds of computation. Without factors all ranks are alike, and one is run.
        overlap: whether there is a stream for the network. If not, as where messages take the processors that compute,
            each task follows the one before.
    """
    ranks = range(len(factors))
    free = [[0.0, 0.0] for _ in ranks]  # when the compute stream and the network stream of each rank are free
    begins: list[list[float]] = []
    ends: list[list[float]] = []
    for index, task in enumerate(tasks):
        stream = int(task.network and overlap)
        begin = [max([free[rank][stream], *(ends[before][rank] for before in task.after)]) for rank in ranks]
        if task.network:
            begin = [max(begin)] * len(begin)
            end = [begin[0] + task.seconds] * len(begin)
        else:
            end = [begin[rank] + task.seconds * (factors[rank][index] if factors[rank] else 1) for rank in ranks]
        for rank in ranks:
            free[rank][stream] = end[rank]
        begins.append(begin)
        ends.append(end)
    return Timeline(tasks, begins, ends)
