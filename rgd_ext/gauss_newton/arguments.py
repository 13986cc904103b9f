"""Checks of what `GaussNewton` is made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..metric.arguments import check_finite

_OWNER = "GaussNewton"


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{_OWNER}({name}={value!r}): pass True or False")


def check_group(group: Mapping[str, Any], adaptive: bool) -> None:
    """Check the rate, the damping, the weight decay and the momentum of a group.

    Raises:
        TypeError: for what is no number.
        ValueError: for numbers out of range.
    """
    for name in ("lr", "damping", "weight_decay", "momentum"):
        value = group[name]
        check_finite(_OWNER, name, value)
        if value < 0:
            raise ValueError(f"{_OWNER}({name}={value}): pass a number that is not negative")
    if adaptive and not group["damping"] > 0:
        raise ValueError(
            f"{_OWNER}(damping=0) with adaptive=True, which multiplies the damping: pass a positive one, such as 1e-3,"
            " or adaptive=False"
        )
    if group["momentum"] >= 1:
        raise ValueError(f"{_OWNER}(momentum={group['momentum']}): pass a number below 1, such as 0.9")
    if adaptive and group["momentum"]:
        raise ValueError(
            f"{_OWNER}(momentum={group['momentum']}) with adaptive=True, whose steps are judged one by one: momentum is"
            " for mini-batches, with adaptive=False"
        )


def check_all_pulled(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError if only some of the groups have damping or weight decay."""
    chosen = [number for number, group in enumerate(groups) if group["lr"]]
    free = [number for number in chosen if not groups[number]["damping"] + groups[number]["weight_decay"]]
    if free and len(free) < len(chosen):
        raise ValueError(
            f"parameter groups {free} have neither damping nor weight decay, and others do: give each group a damping,"
            " such as 1e-3"
        )


def checked_rows(max_rows: int | None) -> int | None:
    """`max_rows`; TypeError or ValueError unless it is a positive int or None."""
    if max_rows is None:
        return None
    if not isinstance(max_rows, int) or isinstance(max_rows, bool):
        raise TypeError(f"{_OWNER}(max_rows={max_rows!r}): pass a number of residuals, an int, or None")
    if max_rows < 1:
        raise ValueError(f"{_OWNER}(max_rows={max_rows}): pass a positive number of residuals")
    return max_rows


def wants_double(dtype: torch.dtype | None) -> bool:
    """Whether products are to be computed in float64.

    Raises:
        TypeError: for what is no dtype.
        ValueError: for another one than float64.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{_OWNER}(dtype={dtype!r}): pass torch.float64, or None")
    if dtype not in (None, torch.float64):
        raise ValueError(f"{_OWNER}(dtype={dtype}): pass torch.float64, or None for the precision of the model")
    return dtype is not None
