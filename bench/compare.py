"""What other packages find for models that people train: per-sample gradients, or what they compute from them.

Each package is used as its documentation says, on small models in float64, and compared with one backward of plain
autograd for each sample. Where the first way to use it is not exact, its options are tried. Then training steps are
timed, which takes minutes and wants a quiet machine. Both go to bench/results/comparison, and docs/comparison.md is
written from there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from . import steps
from .measuring.environment import version
from .measuring.report import Record, show
from .measuring.selection import chosen, run_recorded
from .training.models import SMALL

ROOT = Path(__file__).parents[1]
RESULTS, DOCUMENTATION = ROOT / "bench/results/comparison", ROOT / "docs"
FEATURES, COST = "features.json", "cost.json"  # the records


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser("compare", help=__doc__.partition("\n")[0], description=__doc__)
    choice = command.add_mutually_exclusive_group()
    about = "only cases that have a TEXT in their name, and in this order; no steps are timed, and nothing is written"
    choice.add_argument("--only", metavar="TEXT", nargs="+", help=about)
    choice.add_argument("--report", action="store_true", help="write the page from the records that are there")
    command.set_defaults(run=run)


def run(only: Sequence[str] | None, report: bool) -> list[str]:
    """Try all packages on all cases, time steps, write the records and the page; returns what failed."""
    if only:
        return attempt(only)
    failures = [] if report else attempt(None) or steps.run("cpu", False, str(RESULTS / COST), SMALL)
    if not failures:
        try:
            path = DOCUMENTATION / "comparison.md"
            path.write_text(page())
            print(f"wrote {path}")
        except (OSError, ValueError) as problem:
            sys.exit(str(problem))
    return failures


def page() -> str:
    """The page, from the records; raises ValueError where one is missing or incomplete."""
    from .comparing.cases import CASES
    from .comparing.report import TEMPLATE, page

    return page(read(FEATURES, "case", CASES), read(COST, "model", SMALL), TEMPLATE.read_text())


def read(name: str, kind: str, wanted: Iterable[str]) -> dict:
    """The record of that name, which has to have all cases or models.

    Raises:
        ValueError: if it lacks one; and where a key that it lacks is looked up.
    """
    path, remedy = RESULTS / name, "run `python -m bench compare`"

    class Whole(dict):
        def __missing__(self, key: str) -> None:
            raise ValueError(f"{path} lacks {key!r}: {remedy}")

    try:
        record = json.loads(path.read_text(), object_hook=Whole)
    except (FileNotFoundError, json.JSONDecodeError) as problem:
        raise ValueError(f"{path} holds no record ({problem}): {remedy}") from problem
    found = {result[kind] for result in record[f"{kind}s"]}
    missing = [each for each in wanted if each not in found]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(map(repr, missing))}: {remedy}")
    return record


def attempt(only: Sequence[str] | None) -> list[str]:
    """Try all packages, print what each gives, and write the record of all cases; returns what failed."""
    from .comparing.attempts import WRONG, Result, tried
    from .comparing.cases import CASES
    from .comparing.cells import Footnotes, cell
    from .comparing.packages import PACKAGES

    packages = {name: package for name, package in PACKAGES.items() if version(package.distribution)}
    missing = [PACKAGES[name].distribution for name in PACKAGES if name not in packages]
    if missing:
        about = f"{', '.join(missing)}: not installed; pip install -r bench/requirements.txt"
        if not only:
            return [about]
        print(about, flush=True)
    failures: list[str] = []

    def report(result: Result) -> None:
        notes = Footnotes()
        cells = [cell(attempts, result.success, notes).partition("[")[0] for attempts in result.attempts.values()]
        show(["", *packages], [[[result.case, *cells]]], "per-sample gradients, or what is computed from them")
        if any(attempt.outcome == WRONG for attempt in result.attempts["rgd_ext"].values()):
            failures.append(f"{result.case}: rgd_ext is wrong")

    torch.manual_seed(0)
    record = Record(None if only else str(RESULTS / FEATURES), "compare", "cpu")
    run_recorded(
        record, "cases", chosen(CASES, only or [""]), lambda name, case: tried(name, case, packages), report, failures
    )
    return failures
