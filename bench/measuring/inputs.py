"""Random tensors, and the names of dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Normally distributed numbers, with a mean that is not small beside their spread."""
    return torch.randn(shape, device=device).add_(0.1).to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without `torch.`."""
    return str(dtype).removeprefix("torch.")
