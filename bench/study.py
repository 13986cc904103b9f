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
from .studying.questions import NAMES, load, load_all

ROOT = Path(__file__).parents[1]
RESULTS, DOCUMENTATION = ROOT / "bench" / "results" / "study", ROOT / "docs"
REPORT = "report"
NEEDS = "scikit-learn, scipy, matplotlib and rich"


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser("study", help=__doc__.partition("\n")[0], description=__doc__)
    choices = [*NAMES, REPORT]
    command.add_argument("question", nargs="?", choices=choices, help="default: all of them, one after the other")
    command.add_argument("--quick", action="store_true", help="small sizes, in two minutes; kept only with --results")
    command.add_argument("--data", type=Path, action="append", default=[], metavar="DIR", help="may be repeated")
    about = "of the lines; default: bench/results/study; those of --quick are in DIR/quick"
    command.add_argument("--results", type=Path, metavar="DIR", help=about)
    command.set_defaults(run=run)


def run(question: str | None, quick: bool, data: Sequence[Path], results: Path | None) -> list[str]:
    """Run a question or all, and print their tables; or write the report."""
    try:
        if question == REPORT:
            _report(quick, data, results)
        elif quick and results is None:
            with tempfile.TemporaryDirectory() as scratch:
                _work(question, quick, data, Path(scratch), "nothing is kept without --results DIR")
        else:
            folder = (results or RESULTS) / ("quick" if quick else "")
            _work(
                question, quick, data, folder, f"finished runs are in {folder}, and the same command goes on from there"
            )
    except ModuleNotFoundError as problem:
        sys.exit(f"{problem}: the study needs {NEEDS}")
    except (OSError, RuntimeError, ValueError) as problem:
        sys.exit(str(problem))
    return []


def _work(question: str | None, quick: bool, data: Sequence[Path], folder: Path, if_interrupted: str) -> None:
    """Run a question or all, and print their tables."""
    # They need packages that other benchmarks do without.
    from .studying import report
    from .studying.data import Sources
    from .studying.question import Scope
    from .studying.runner import work
    from .studying.store import Store

    sources = Sources(data)
    for name in [question] if question else NAMES:
        wanted = load(name)
        try:
            work(wanted, Store(folder, name), Scope(quick, sources.names), sources)
        except KeyboardInterrupt:
            sys.exit(f"interrupted: {if_interrupted}")
        for answer in report.answers({name: wanted}, folder).values():
            for about, table in answer.tables.items():
                show(table.header, [list(map(list, table.rows))], f"{wanted.title} ({about})")


def _report(quick: bool, data: Sequence[Path], results: Path | None) -> None:
    """Write the page and its figures, and print the path of the page."""
    from .studying import report

    if quick or data:
        raise ValueError("the report is made of the lines that are there: leave out --quick and --data")
    print(report.write(load_all(), results or RESULTS, DOCUMENTATION))
