"""Precision of what runs in a backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_UNCHANGED = nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager:
    """Products of the statistics in the dtype they are given, even if backward is called under autocast."""
    kind = device.type  # meta tensors know no autocast
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else _UNCHANGED
