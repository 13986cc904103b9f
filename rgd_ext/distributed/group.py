"""A group of processes, and the collectives of torch.distributed that an exchange is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, distributed

from ..bits import flat_bits

if distributed.is_available():
    # Its functions keep the default group of the time of its import, an argument of theirs, alive. The first optimizer
    # imports it: after `init_process_group`, gloo's threads would then outlive `destroy_process_group`, and may abort
    # the process while the interpreter exits (see PyTorch's pull request 179291).
    import torch.distributed.nn.functional

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    ProcessGroupLike: TypeAlias = ProcessGroup | DeviceMesh
else:
    ProcessGroupLike = Any  # torch may be built without torch.distributed

# Bytes that one broadcast takes.
_PIECE = 25 << 20


class Group:
    """The processes that train one model together; R of them.

    Collectives of numbers run on the host. Where the group is one for GPUs only, as with NCCL, they have a group of
    their own, so that no process waits for its device.

    Args:
        process_group: a group of torch.distributed that this process is in, or a mesh of one dimension.

    Attributes:
        process_group: the group of torch.distributed.
        rank: of this process in the group, from 0.
        size: R.

    Raises:
        TypeError: for anything else.
        ValueError: for a mesh of more dimensions, or a group without this process.
    """

    def __init__(self, process_group: ProcessGroupLike) -> None:
        self.process_group = as_process_group(process_group)
        self.rank, self.size = distributed.get_rank(self.process_group), distributed.get_world_size(self.process_group)
        if self.rank < 0:
            raise ValueError("process_group has no part of this process: pass a group that it is in")
        self._root = distributed.get_global_rank(self.process_group, 0)
        self._cpu_group = self.process_group if _serves_hosts(self.process_group) else _for_hosts(self.process_group)

    def places(self, sizes: Sequence[int]) -> slice:
        """The places of this process's samples among all, rank by rank, given the number of each process."""
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def all_gather_objects(self, what: str, item: object) -> list[Any]:
        """What each process passes, in the order of their ranks."""
        found: list[Any] = [None] * self.size
        with self.named(what):
            distributed.all_gather_object(found, item, group=self._cpu_group)
        return found

    def start_all_gather(self, what: str, numbers: Sequence[int]) -> PendingAllGather:
        """Begin to gather whole numbers, as many from each process."""
        own = torch.tensor(numbers, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self.named(what):
            work = distributed.all_gather(found, own, group=self._cpu_group, async_op=True)
        return PendingAllGather(self, what, work, found)

    def all_gather_rows(self, what: str, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes, one below the other.

        Args:
            what: names the collective in errors.
            rows: of this process, (sizes[rank], n).
            sizes: how many rows each process has.
        """
        own = rows.new_zeros(max(sizes), *rows.shape[1:])
        own[: len(rows)] = rows
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self.named(what):
            distributed.all_gather(found, own, group=self.process_group)
        return torch.cat([each[:size] for each, size in zip(found, sizes, strict=True)])

    def start_all_reduce(self, what: str, buffer: Tensor) -> PendingAllReduce:
        """Begin to replace a tensor by its sum over the processes, which has the same bits in all of them."""
        with self.named(what):
            return PendingAllReduce(self, what, distributed.all_reduce(buffer, group=self.process_group, async_op=True))

    def broadcast(self, what: str, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite tensors by those of the process of rank `source`."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in filter(Tensor.numel, tensors):
            by_device.setdefault(tensor.device, []).append(tensor)
        for group in by_device.values():
            for piece in _pieces(group):
                self._broadcast(what, piece, source)

    @torch.no_grad()
    def _broadcast(self, what: str, tensors: list[Tensor], source: int) -> None:
        joined = torch.cat([flat_bits(tensor, torch.uint8) for tensor in tensors])
        root = self._root if source == 0 else distributed.get_global_rank(self.process_group, source)
        with self.named(what):
            distributed.broadcast(joined, root, group=self.process_group)
        if self.rank != source:
            for tensor, part in zip(tensors, joined.split([tensor.nbytes for tensor in tensors]), strict=True):
                # Autograd refuses a backward whose forward has saved what is written to. On a GPU the host would wait.
                if not (tensor.is_cpu and torch.equal(flat_bits(tensor, torch.uint8), part)):
                    # A copy, since a view of another dtype has to be aligned.
                    tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Name the collective in an error of torch.distributed."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"the exchange of {what} with the other {self.size - 1} processes of the group failed in the process of"
                f" rank {self.rank}: one of them has ended, or has not come to the same call within the timeout of the"
                " group. Look for the first error among the outputs of all processes. Nothing was written to .grad"
                f" here; start all processes again, from a checkpoint. torch.distributed says: {error}"
            ) from error


class _Pending:
    """A collective that is under way.

    Args:
        group: the processes.
        what: names it in errors.
        work: of torch.distributed.
    """

    def __init__(self, group: Group, what: str, work: Any) -> None:
        self._group, self._what, self._work = group, what, work

    def wait(self) -> None:
        """Wait for it; on a GPU, have the current stream wait.

        Raises:
            RuntimeError: if a process has ended, or the timeout of the group is over.
        """
        with self._group.named(self._what):
            self._work.wait()


class PendingAllReduce(_Pending):
    """A sum over the processes that is under way."""


class PendingAllGather(_Pending):
    """Whole numbers of all processes that are under way."""

    def __init__(self, group: Group, what: str, work: Any, found: list[Tensor]) -> None:
        super().__init__(group, what, work)
        self._found = found

    def numbers(self) -> list[list[int]]:
        """Wait for them; the numbers of each process. Raises as `wait`."""
        self.wait()
        return [each.tolist() for each in self._found]


def as_process_group(process_group: object) -> ProcessGroup:
    """The group that a user passes, or that a mesh stands for; raises as `Group`."""
    remedy = "pass a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD after init_process_group()"
    if not distributed.is_available():
        raise TypeError(f"process_group is {process_group!r}, and this torch is built without torch.distributed")
    if isinstance(process_group, distributed.device_mesh.DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group is a mesh of {process_group.ndim} dimensions, {process_group.mesh_dim_names}: pass one"
                " dimension of it, mesh['name'], along which the model is replicated; or, for a model that is sharded"
                " over all of it, the group of all its processes, such as torch.distributed.group.WORLD"
            )
        return process_group.get_group()
    if process_group == distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group is one that this process is not in: pass a group that it is in")
    if not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(f"process_group is {process_group!r}: {remedy}")
    return process_group


def _serves_hosts(group: ProcessGroup) -> bool:
    """Whether it has a backend for tensors in the memory of the host."""
    return any(device.type == "cpu" for device in group._device_types)


def _for_hosts(group: ProcessGroup) -> ProcessGroup:
    """A group of the same processes for tensors in the memory of the host, with the same timeout."""
    ranks = distributed.get_process_group_ranks(group)
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    timeout = getattr(options, "_timeout", None)
    # Without the other processes, where there are any, which do not come to this call.
    is_part = len(ranks) < distributed.get_world_size()
    found = distributed.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=is_part)
    return cast("ProcessGroup", found)


def _pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of at most `_PIECE` bytes, or of one tensor."""
    piece: list[Tensor] = []
    for tensor in tensors:
        if piece and sum(each.nbytes for each in piece) + tensor.nbytes > _PIECE:
            yield piece
            piece = []
        piece.append(tensor)
    if piece:
        yield piece
