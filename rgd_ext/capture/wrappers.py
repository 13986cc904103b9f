"""Checks against wrappers for several processes, in which a captured model would silently train wrongly."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..nests import modules_in

_WRAPPERS = DistributedDataParallel, nn.DataParallel
_REMEDY = (
    "Capture the model itself and call it, with no wrapper around it, in every process; start from equal parameters"
    " (torch.distributed.broadcast), and average the directions after each backward(): `for p in [p for p in"
    " model.parameters() if p.grad is not None]: torch.distributed.all_reduce(p.grad,"
    " op=torch.distributed.ReduceOp.SUM); p.grad /= torch.distributed.get_world_size()`"
)


def check_not_wrapped(model: nn.Module) -> None:
    """Raise ValueError if parts of `model` are wrapped for data parallelism or sharded."""
    for name, module in model.named_modules():
        if isinstance(module, _WRAPPERS):
            raise ValueError(
                f"module '{name or type(module).__name__}' is a {type(module).__name__}, which does not find the"
                f" gradients of a captured model. {_REMEDY}"
            )
    check_not_sharded(model)


def check_not_sharded(model: nn.Module) -> None:
    """Raise ValueError if `model` has been given to torch.distributed.fsdp, or its parameters are distributed."""
    tensor = sys.modules.get("torch.distributed.tensor")
    is_distributed = tensor is not None and any(isinstance(p, tensor.DTensor) for p in model.parameters())
    if is_distributed or any("_is_fsdp_managed_module" in vars(module) for module in modules_in(model)):
        raise ValueError(
            f"the parameters of the model ({type(model).__name__}) are sharded (fully_shard, FullyShardedDataParallel"
            f" or DTensor), and those of a captured model must be whole: build it anew without them. {_REMEDY}"
        )


def check_not_in_ddp(model: nn.Module) -> None:
    """Raise RuntimeError in the forward of a DistributedDataParallel that has parameters of `model`."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None:
        return
    owned = {id(p) for p in model.parameters()}
    if any(id(p) in owned for p in ddp.parameters()):
        raise RuntimeError(
            f"the captured model ({type(model).__name__}) is called inside a DistributedDataParallel, which does not"
            f" find its gradients: they would be zero, or differ between the processes. {_REMEDY}"
        )
