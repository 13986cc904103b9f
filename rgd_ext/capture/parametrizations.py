"""Modules whose parameters are computed, as by `torch.nn.utils.parametrize`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm


@contextmanager
def cache_suspended() -> Iterator[None]:
    """Suspend `torch.nn.utils.parametrize.cached()`: nothing inside reads its cache or fills it."""
    saved, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = saved


@contextmanager
def power_iterations_done(module: nn.Module) -> Iterator[None]:
    """Do the power iterations of a parametrised module's spectral norms once, before what runs inside.

    Otherwise a second attempt to run the module, after one that failed, would repeat them.
    """
    parametrizations: Any = module.parametrizations
    norms = [
        norm for each in parametrizations.values() for norm in each if isinstance(norm, _SpectralNorm) and norm.training
    ]
    if norms:
        with torch.no_grad():
            for name in parametrizations:
                getattr(module, name)
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
