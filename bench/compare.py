"""What other packages find for models that people train: per-sample gradients, or what they compute from them.

Each package is used as its documentation says, on small models in float64, and compared with one backward of plain
autograd for each sample. Where the first way to use it is not exact, its options are tried. The results are written to
bench/results/comparison.json, and docs/comparison.md from them and from the record of `steps`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import steps
from .measuring.environment import version
from .measuring.report import Record, show
from .measuring.selection import chosen, run_recorded

ROOT = Path(__file__).parents[1]
RESULTS, STEPS = ROOT / "bench/results/comparison.json", ROOT / "bench/results/epyc/steps.json"
DOCUMENTATION = ROOT / "docs"


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser("compare", help=__doc__.partition("\n")[0], description=__doc__)
    about = "only what has a TEXT in its name, and in this order; nothing is written"
    command.add_argument("--only", metavar="TEXT", nargs="+", help=about)
    choice = command.add_mutually_exclusive_group()
    choice.add_argument(
        "--cost", action="store_true", help="first run `steps` for the table of cost, on a quiet machine"
    )
    choice.add_argument("--report", action="store_true", help="write the page from the records that are there")
    command.set_defaults(run=run)


def run(only: Sequence[str] | None, cost: bool, report: bool) -> list[str]:
    """Try all packages on all cases, write the record and the page; returns what failed."""
    failures = []
    if cost:
        failures += steps.run("cpu", False, str(STEPS), [""])
    if not report:
        failures += attempt(only)
    if not only and not failures:
        try:
            (DOCUMENTATION / "comparison.md").write_text(page())
        except (OSError, ValueError) as problem:
            sys.exit(str(problem))
    return failures


def page() -> str:
    """The page, from the records."""
    from .comparing.report import TEMPLATE, page

    return page(*(json.loads(path.read_text()) for path in (RESULTS, STEPS)), TEMPLATE.read_text())


def attempt(only: Sequence[str] | None) -> list[str]:
    """Try all packages, print what each gives, and write the record of all cases; returns what failed."""
    from .comparing.attempts import WRONG, Result, tried
    from .comparing.cases import CASES
    from .comparing.cells import Footnotes, cell
    from .comparing.packages import PACKAGES

    packages = {name: package for name, package in PACKAGES.items() if version(package.distribution)}
    missing = [PACKAGES[name].distribution for name in PACKAGES if name not in packages]
    if missing and not only:
        return [f"{', '.join(missing)}: not installed; pip install -r bench/requirements.txt"]
    failures: list[str] = []

    def report(result: Result) -> None:
        notes = Footnotes()
        cells = [cell(attempts, result.success, notes).partition("[")[0] for attempts in result.attempts.values()]
        show(["", *packages], [[[result.case, *cells]]], "per-sample gradients, or what is computed from them")
        if any(attempt.outcome == WRONG for attempt in result.attempts["rgd_ext"].values()):
            failures.append(f"{result.case}: rgd_ext is wrong")

    torch.manual_seed(0)
    record = Record(None if only else str(RESULTS), "compare", "cpu")
    run_recorded(
        record, "cases", chosen(CASES, only or [""]), lambda name, case: tried(name, case, packages), report, failures
    )
    return failures
