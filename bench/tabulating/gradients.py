"""The table of the direction from materialised per-sample gradients."""

from __future__ import annotations

from ..gradients.result import Result
from .columns import Cell, field, milliseconds

OURS, OF_ONE_TENSOR = "precondition", "precondition of one tensor"


def result_of(case: dict) -> Result:
    """The result as the benchmark made it, without the ceilings."""
    return Result(**{name: value for name, value in case.items() if name != "ceilings"})


def best(role: str) -> Cell:
    """The median time of the fastest arm of a role; empty if none was measured."""

    def cell(case: dict) -> str:
        result = result_of(case)
        name = result.best(role)
        return milliseconds(result.median(name)) if name else ""

    return cell


def of_a_copy(case: dict) -> str:
    """The bandwidth of ours, divided by that of a copy on the same device."""
    return f"{result_of(case).bandwidth(OURS) / case['ceilings']['copy']:.0%}"


DIRECTION: dict[str, Cell] = {
    "per-sample gradients": field("case"),
    "ours": best(OURS),
    "in one tensor": best(OF_ONE_TENSOR),
    "best plain PyTorch": best("eager"),
    "torch.compile": best("compile"),
    "naive formula": best("naive"),
    "two linear reads of G": best("read"),
}
ON_CUDA = DIRECTION | {"bandwidth / that of a copy": of_a_copy}
