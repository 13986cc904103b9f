"""Processes that measure together: each has a rank in one group of torch.distributed, and one thread."""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.multiprocessing import ProcessRaisedException, start_processes

T = TypeVar("T")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
PATIENCE = datetime.timedelta(minutes=5)  # of a collective, on a machine that is busy


@dataclass(frozen=True)
class Member:
    """A process of the group.

    Attributes:
        rank, size: in the group, which is `torch.distributed.group.WORLD`.
        device: "cpu" or "cuda", where each process has a GPU of its own.
        hosts: a group of the same processes, by gloo, in which they exchange what they have measured.
    """

    rank: int
    size: int
    device: str
    hosts: Any

    def wait(self) -> None:
        """Wait for the other processes."""
        distributed.barrier(self.hosts)

    def gather(self, item: T) -> list[T]:
        """What each process passes."""
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, item, group=self.hosts)
        return found

    def largest(self, number: float) -> float:
        """The largest number of all processes, the same in each of them."""
        return max(self.gather(number))

    def means(self, numbers: Sequence[float]) -> list[float]:
        """The mean over the processes of each number."""
        return [sum(each) / self.size for each in zip(*self.gather(numbers), strict=True)]


def run_together(function: Callable[..., T], size: int, device: str, *arguments: object) -> T:
    """What `function(member, *arguments)` returns in the process of rank 0, while all `size` processes run it.

    Raises:
        RuntimeError: with the last line of the error, if a process fails.
    """
    with TemporaryDirectory() as folder:
        try:
            start_processes(_serve, (function, size, device, folder, arguments), size, start_method="spawn")
        except ProcessRaisedException as error:
            raise RuntimeError(f"process {error.error_index}: {str(error).strip().splitlines()[-1]}") from error
        return pickle.loads(_result(folder).read_bytes())


def _result(folder: str) -> Path:
    return Path(folder) / "result"


def _serve(
    rank: int, function: Callable[..., object], size: int, device: str, folder: str, arguments: Sequence[object]
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = distributed.FileStore(str(Path(folder) / "store"), size)
    distributed.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=size, timeout=PATIENCE)
    member = Member(rank, size, device, distributed.new_group(backend="gloo", timeout=PATIENCE))
    result = function(member, *arguments)
    if rank == 0:
        _result(folder).write_bytes(pickle.dumps(result))
    member.wait()  # a process that ends early is an error for those that it is connected to
    distributed.destroy_process_group()
