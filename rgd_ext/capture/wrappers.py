"""Wrappers for several processes: those that a captured model may be handed in with, and checks against all others."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import ProcessGroupLike, has_dtensors, is_fsdp_module
from ..nests import modules_in

_WRAPPERS = DistributedDataParallel, nn.DataParallel
_REMEDY = (
    "Capture the model itself and call it, with no wrapper around it, in a process for each device:"
    " `rgd_ext.precondition(model, process_group=torch.distributed.group.WORLD)`"
)
_FLATTENED = (
    "module '{}' is a FullyShardedDataParallel, which flattens the parameters of a captured model: build the model"
    " without it, and shard it with torch.distributed.fsdp.fully_shard in its place, before the capture"
)
_SHARDED = (
    "the parameters of the model ({}) are sharded (fully_shard, FullyShardedDataParallel around it or another DTensor),"
    " and this capture needs whole ones: call .remove() on the handle if there is one, call fully_shard before the"
    " capture, and pass the group of its processes,"
    " `rgd_ext.precondition(model, process_group=torch.distributed.group.WORLD)`, which RGD and observe take as well;"
    " anything else of rgd_ext takes a model that is not sharded"
)
NEEDS_WHOLE = (
    "the parameters of the model ({}) are sharded, and verify and DiffusionMatrix need whole ones: call them before"
    " fully_shard, or with a smaller model that the same code builds"
)
_WRAPPED_LATER = (
    "the captured model ({}) is called through a DistributedDataParallel that does not find its gradients: they would"
    " be zero, or differ between the processes. Remove the capture, and hand in the DistributedDataParallel:"
    f" `rgd_ext.precondition(ddp)`, or RGD(ddp). Or: {_REMEDY}"
)
_NO_SYNC = (
    "no_sync() of a DistributedDataParallel whose model is captured: each backward inside would write a direction of"
    " its own. Collect the backwards instead: all of them, the last too, inside of `with handle.accumulate():`; or call"
    " handle.defer() once, and handle.write() before each step, and no_sync() is allowed"
)
_JOIN = (
    "join() of a DistributedDataParallel whose model is captured: in a process that has no data left make the steps"
    " that the others make, each with optimizer.zero_grad(), `with handle.accumulate(): pass` and optimizer.step()"
)


class Wrapper:
    """A DistributedDataParallel whose module is captured: it passes calls on, and the capture exchanges gradients.

    Args:
        ddp: the wrapper.

    Attributes:
        module: what it wraps.
        process_group: its processes.
        shares_buffers: whether the buffers of rank 0 are those of all.

    Raises:
        ValueError: for options by which it does more than exchange gradients.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        for is_used, option in (
            (ddp.static_graph, "static_graph=True"),
            (ddp.mixed_precision is not None, "mixed_precision"),
            (ddp._comm_hooks, "a communication hook"),
            (ddp.parameters_to_ignore, "parameters that it ignores"),
        ):
            if is_used:
                raise ValueError(
                    f"the DistributedDataParallel has {option}, which a captured model cannot follow: build it without,"
                    " or capture its module, rgd_ext.precondition(ddp.module, process_group=ddp.process_group), and"
                    " call that"
                )
        self.module: nn.Module = ddp.module
        self.process_group: ProcessGroupLike = ddp.process_group
        self.shares_buffers: bool = ddp.broadcast_buffers
        self._ddp, self._is_collecting = ddp, _never

    def silence(self, is_collecting: Callable[[], bool]) -> None:
        """From now on it exchanges nothing.

        Args:
            is_collecting: tells whether backwards are only collected.
        """
        self._is_collecting = is_collecting
        self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = False
        # In the instance, in front of the methods of the class. The hook serves torch.distributed.algorithms.Join, too.
        vars(self._ddp).update(no_sync=self._no_sync, join_hook=self._join_hook)

    def restore(self) -> None:
        """Make it what it was."""
        self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = True
        for name in ("no_sync", "join_hook"):
            vars(self._ddp).pop(name, None)

    def wraps(self, ddp: DistributedDataParallel) -> bool:
        """Whether it is this one, which exchanges nothing."""
        return ddp is self._ddp and not ddp.require_backward_grad_sync

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        if not self._is_collecting():
            raise RuntimeError(_NO_SYNC)
        yield

    def _join_hook(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError(_JOIN)


def _never() -> bool:
    return False


def warn_of_processes() -> None:
    """Warn that each of several processes will train a model of its own."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        warnings.warn(
            f"torch.distributed has {distributed.get_world_size()} processes, and process_group is None, so that the"
            " direction is that of this process's own samples, and the models of the processes drift apart: pass"
            " process_group=torch.distributed.group.WORLD if they are one model",
            stacklevel=4,
        )


def check_not_wrapped(model: nn.Module) -> None:
    """Raise ValueError if parts of `model` are wrapped for data parallelism."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        if isinstance(module, _WRAPPERS):
            raise ValueError(
                f"module '{name or type(module).__name__}' is a {type(module).__name__}, which does not find the"
                f" gradients of a captured model. {_REMEDY}"
            )
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(_FLATTENED.format(name or type(module).__name__))


def check_not_sharded(model: nn.Module, message: str = _SHARDED) -> None:
    """Raise ValueError if `model` has been given to torch.distributed.fsdp, or its parameters are distributed."""
    # The second holds inside of FSDP, even where no parameter of this part is a DTensor.
    if has_dtensors(model) or any("_is_fsdp_managed_module" in vars(module) for module in modules_in(model)):
        raise ValueError(message.format(type(model).__name__))


def check_whole(module: nn.Module, name: str) -> None:
    """Raise ValueError if parts of `module`, which is captured as one layer, are passed to `fully_shard` alone."""
    for key, child in module.named_modules():
        if key and is_fsdp_module(child):
            raise ValueError(
                f"module '{key}' of '{name}' ({type(module).__name__}) was passed to fully_shard, and '{name}' is"
                f" captured as one layer, whose parameters have to be whole together: call fully_shard on '{name}'"
                " or a module around it instead"
            )


def check_not_in_ddp(model: nn.Module, wrapper: Wrapper | None) -> None:
    """Raise RuntimeError in the forward of a DistributedDataParallel around parameters of `model`, if not `wrapper`."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None or (wrapper is not None and wrapper.wraps(ddp)):
        return
    owned = {id(p) for p in model.parameters()}
    if any(id(p) in owned for p in ddp.parameters()):
        raise RuntimeError(_WRAPPED_LATER.format(type(model).__name__))
