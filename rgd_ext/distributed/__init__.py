"""Exact directions of models that several processes train together, each on a part of the batch."""

from __future__ import annotations

from .across_ranks import AcrossRanks
from .agreement import agree
from .buckets import is_large
from .exchange import MODES, Exchange, Mode
from .group import Group, ProcessGroupLike, as_process_group
from .own_samples import OwnSamples
from .parameters import ModelParameters
from .sharding import has_dtensors, is_dtensor, is_fsdp_module

__all__ = [
    "MODES",
    "AcrossRanks",
    "Exchange",
    "Group",
    "Mode",
    "ModelParameters",
    "OwnSamples",
    "ProcessGroupLike",
    "agree",
    "as_process_group",
    "has_dtensors",
    "is_dtensor",
    "is_fsdp_module",
    "is_large",
]
