"""The precision that operators compute in: autocast, and the lowest precision of a forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .modes import OperatorMode

_UNCHANGED = nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast, for products of the statistics in a backward that is called under autocast."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device.type) else _UNCHANGED


def is_autocast(kind: str) -> bool:
    """Whether autocast is enabled for a type of devices; False for those without autocast, such as meta."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class LowestPrecision(OperatorMode):
    """Finds the floating-point dtype of the lowest precision among the results of operators.

    Attributes:
        dtype: that dtype; float64 before the first result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    def operator(self, func: Callable, args: tuple, kwargs: dict) -> object:
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            is_real = isinstance(x, Tensor) and x.dtype.is_floating_point
            if is_real and torch.finfo(x.dtype).eps > torch.finfo(self.dtype).eps:
                self.dtype = x.dtype
        return result
