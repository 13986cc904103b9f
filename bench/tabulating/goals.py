"""What the records of a GPU say of the goals that this project has for GPUs.

    python -m bench.tabulating.goals FOLDER

FOLDER has the records of bench/gpu_check.sh, kernels*.json and steps*.json. Of several cases the worst counts. A goal
that is missed is no failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..gradients.cases import DTYPES
from ..gradients.result import Result
from ..measuring.inputs import dtype_name
from ..measuring.report import plain
from ..measuring.timing import ratio
from ..training.result import graph_of
from .records import records

HEADER = ("goal", "needed", "wanted", "measured", "reached")

# Bytes of G. A part of it may be in the L2 cache, which holds less than a tenth of the first and half of the second.
LARGE, UNCACHED = 1e9, 1.2e8
MANY = 100  # tensors
OURS, FLAT = "precondition", "precondition of one tensor"


@dataclass(frozen=True)
class Goal:
    """What the number `measured` has to be, and what it should be: at least or at most that much."""

    what: str
    measured: float | None
    needed: float
    wanted: float
    sign: str

    def row(self) -> list[str]:
        """Its line in the table."""
        bounds = self.needed, self.wanted
        cells = [self.what, *(f"{self.sign} {bound:.2f}" for bound in bounds)]
        if self.measured is None:
            return [*cells, "", "not measured"]
        reached = [self.measured >= bound if self.sign == ">=" else self.measured <= bound for bound in bounds]
        return [*cells, f"{self.measured:.2f}", "wanted" if all(reached) else "needed" if any(reached) else "no"]


def at_least(what: str, found: Iterable[float], needed: float, wanted: float) -> Goal:
    return Goal(what, min(found, default=None), needed, wanted, ">=")


def at_most(what: str, found: Iterable[float], needed: float, wanted: float) -> Goal:
    return Goal(what, max(found, default=None), needed, wanted, "<=")


def of_kernels(found: list[dict]) -> list[Goal]:
    """The goals for the direction from materialised gradients, by records of `python -m bench kernels`."""
    measured = [(Result(**case), record["ceilings"]) for record in found for case in record["cases"]]
    measured = [(case, ceilings) for case, ceilings in measured if OURS in case.milliseconds]
    flat = [(case, ceilings) for case, ceilings in measured if case.tensors == 1]
    large = [(case, ceilings) for case, ceilings in flat if case.bytes >= LARGE]

    def of_copy(dtype: str) -> list[float]:
        return [case.bandwidth(OURS) / ceilings["copy"] for case, ceilings in large if case.dtype == dtype]

    def others(role: str) -> list[float]:
        """Median times of the fastest other way, divided by ours."""
        best = [(case, case.best(role)) for case, _ in large]
        return [case.median(name) / case.median(OURS) for case, name in best if name]

    def by_batch_size(dtype: str) -> list[float]:
        """For each number of samples the best bandwidth, divided by the best of all."""
        best: dict[int, float] = {}
        for case, _ in flat:
            if case.dtype == dtype and case.bytes >= UNCACHED:
                best[case.batch_size] = max(best.get(case.batch_size, 0.0), case.bandwidth(OURS))
        return [bandwidth / max(best.values()) for bandwidth in best.values()]

    lists = [case for case, _ in measured if case.tensors >= MANY and FLAT in case.milliseconds]
    dtypes = [dtype_name(dtype) for dtype in DTYPES]
    return [
        *(at_least(f"bandwidth / that of a copy, G >= 1 GB, {d}", of_copy(d), 0.90, 0.95) for d in dtypes),
        at_least("best plain PyTorch / ours, G >= 1 GB", others("eager"), 1.6, 1.6),
        at_least("naive formula / ours, G >= 1 GB", others("naive"), 2.8, 2.8),
        at_least("best torch.compile / ours, G >= 1 GB", others("compile"), 1.5, 1.5),
        at_least("one tensor / a list of 100 or more", [c.median(FLAT) / c.median(OURS) for c in lists], 0.9, 0.9),
        *(at_least(f"slowest / fastest number of samples, {d}", by_batch_size(d), 0.8, 0.8) for d in dtypes),
    ]


# RGD over SGD, by the model's name.
STEPS = {
    "MLP 784-2048-2048-10, B = 256": (1.25, 1.08),
    "ResNet-GN 0.3M, B = 128": (1.5, 1.25),
    "Wide ResNet-16-8, GN, B = 32": (1.5, 1.25),
    "GPT-2 small's shape, autocast, B = 8": (1.25, 1.10),
    "GPT-2 small's shape, bfloat16, B = 8": (1.25, 1.10),
}


def of_steps(found: list[dict]) -> list[Goal]:
    """The goals for training steps, by records of `python -m bench steps`."""
    samples = {model["model"]: model["milliseconds"] for record in found for model in record["models"]}
    goals = [
        at_most(
            f"RGD / SGD, {name}",
            [ratio(samples[name], "RGD Spectral", "SGD")[0]] if "RGD Spectral" in samples.get(name, {}) else [],
            *bounds,
        )
        for name, bounds in STEPS.items()
    ]
    graph, base = graph_of("RGD Spectral"), graph_of("SGD")
    graphs = [ratio(times, graph, base)[0] for times in samples.values() if {graph, base} <= times.keys()]
    return [*goals, at_most("RGD / SGD, small models as CUDA graphs", graphs, 1.2, 1.2)]


def rows(folder: Path) -> list[list[str]]:
    """The table of all goals.

    Raises:
        ValueError: if a record is missing, or is of a CPU.
    """
    found = {benchmark: records(folder, benchmark) for benchmark in ("kernels", "steps")}
    for benchmark, parts in found.items():
        if any(part["device"] != "cuda" for part in parts):
            raise ValueError(f"{folder}: {benchmark} was run on a CPU, and these goals are for GPUs: use --device cuda")
    return [goal.row() for goal in [*of_kernels(found["kernels"]), *of_steps(found["steps"])]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tabulating.goals", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with kernels*.json and steps*.json")
    try:
        print(plain(HEADER, [rows(parser.parse_args().folder)], "goals for GPUs"))
    except ValueError as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
