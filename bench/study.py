"""The study of trainings along (I - eps D) g: runs the questions, or writes their report.

Every finished run is one line of JSON in QUESTION.jsonl: its configuration, which is all that its outcome depends on,
the outcome, the time and the machine. A study that is killed goes on where it was; started in several terminals, the
processes share the runs. `report` makes docs/study.md and its figures from the lines.

The data are scikit-learn's digits, and what the folders named by --data hold: Fashion-MNIST and MNIST (the IDX files of
their authors, which for Fashion-MNIST Debian's package dataset-fashion-mnist installs), CIFAR-10 (binary version) and
SVHN (train_32x32.mat and test_32x32.mat).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .measuring.report import show
from .studying import report
from .studying.data import Sources
from .studying.question import Question, Scope
from .studying.questions import NAMES, load, load_all
from .studying.runner import work
from .studying.store import Store

ROOT = Path(__file__).parents[1]
RESULTS, DOCUMENTATION = ROOT / "bench" / "results" / "study", ROOT / "docs"
REPORT = "report"


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser("study", help=__doc__.partition("\n")[0], description=__doc__)
    choices = [*NAMES, REPORT]
    command.add_argument("question", nargs="?", choices=choices, help="default: all of them, one after the other")
    command.add_argument("--quick", action="store_true", help="small sizes, and lines that are not kept: 2 minutes")
    command.add_argument("--data", type=Path, action="append", default=[], metavar="DIR", help="may be repeated")
    command.add_argument("--results", type=Path, metavar="DIR", help="of the lines; default: bench/results/study")
    command.set_defaults(run=run)


def run(question: str | None, quick: bool, data: Sequence[Path], results: Path | None) -> list[str]:
    """Run a question or all, and print their tables; or write the report."""
    if question == REPORT and (quick or data):
        sys.exit("report is made of the lines that are there: leave out --quick and --data")
    if question == REPORT:
        print(report.write(load_all(), results or RESULTS, DOCUMENTATION))
        return []
    try:
        sources = Sources(data)
    except ValueError as problem:
        sys.exit(f"--data: {problem}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = results or (Path(scratch) if quick else RESULTS)
        for name in [question] if question else NAMES:
            wanted = load(name)
            try:
                work(wanted, Store(folder, name), Scope(quick, sources.names), sources)
            except KeyboardInterrupt:
                sys.exit(f"interrupted: finished runs are in {folder}, and the same command goes on from there")
            _print(name, wanted, folder)
    return []


def _print(name: str, question: Question, folder: Path) -> None:
    """The tables of a question."""
    for answer in report.answers({name: question}, folder).values():
        for about, table in answer.tables.items():
            show(table.header, [list(map(list, table.rows))], f"{question.title} ({about})")
