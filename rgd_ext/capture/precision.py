"""Precision of what runs in a backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_UNCHANGED = nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager:
    """Products of the statistics in the dtype they are given, even if backward is called under autocast."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else _UNCHANGED
