"""Precision of what runs in a backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_UNCHANGED = nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager:
    """Products of the statistics in the dtype they are given, even if backward is called under autocast."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device.type) else _UNCHANGED


def is_autocast(kind: str) -> bool:
    """Whether autocast is enabled for devices of a kind; meta tensors know none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
