"""Tests for what torch has distributed, which import torch's packages only where they are in use already."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor, nn

from ..nests import modules_in


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor itself, or all of a DTensor, for which all processes exchange their parts."""
    return cast("Any", tensor).full_tensor() if is_dtensor(tensor) else tensor


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether a module was passed to `fully_shard`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def has_dtensors(model: nn.Module) -> bool:
    """Whether `fully_shard` has sharded parts of a model, or parameters of it are distributed otherwise."""
    return any(map(is_dtensor, model.parameters())) or any(map(is_fsdp_module, modules_in(model)))
