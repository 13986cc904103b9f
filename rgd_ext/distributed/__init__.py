"""Exact directions of models that several processes train together, each on a part of the batch."""

from __future__ import annotations

from .across_ranks import AcrossRanks
from .agreement import agree
from .buckets import is_large
from .exchange import MODES, Exchange, Mode
from .group import Group, ProcessGroupLike, as_process_group
from .own_samples import OwnSamples
from .parameters import ModelParameters
from .sharding import is_distributed, is_sharded, is_sharding

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
    "is_distributed",
    "is_large",
    "is_sharded",
    "is_sharding",
]
