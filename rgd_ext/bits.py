"""The bits of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of a tensor as numbers of `dtype`, flat; a view where the tensor is contiguous."""
    tensor = tensor.detach().contiguous()
    # A tensor of one element is contiguous whatever its stride is, which `view` would keep and refuse.
    return tensor.as_strided((tensor.numel(),), (1,)).view(dtype)
