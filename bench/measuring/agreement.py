"""How far a result is from its value in float64, and how far it may be."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.utils._pytree import tree_leaves

# Of the largest value of a result.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def error(got: object, want: object) -> float:
    """The largest difference over the largest value, of the worst tensor; NaN where a result is NaN."""
    pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
    errors = [(g.double() - w).abs().max() / w.abs().max() for g, w in pairs]
    return float(torch.stack(errors).max())


def without_tf32() -> AbstractContextManager:
    """Within, cuDNN's convolutions of float32 are computed in float32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
