"""The page of the study: a template with prose, filled in with the tables, figures and numbers of the runs."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..measuring.pages import filled, markdown
from .question import Answer, Finished, Question
from .store import Store

TEMPLATE = Path(__file__).with_name("study.md")
PAGE, FIGURES = "study.md", "study"  # the page, and the folder of its figures, in the folder of the documentation
WIDTH = 10.0  # inches
# The entry of a PNG's metadata that tells from which lines it was drawn.
LINES = "Lines"


def answers(questions: Mapping[str, Question], folder: Path) -> dict[str, Answer]:
    """The answers to the questions that have lines in `folder`.

    Raises:
        ValueError: if lines lack what an answer needs.
    """
    found = {}
    for name, question in questions.items():
        store = Store(folder, name)
        store.refresh()
        if len(store.finished):
            try:
                answer = question.answer(store.finished)
            except KeyError as error:
                raise ValueError(
                    f"a line of {store.path} has no {error}, so another version of the study wrote it: move the file"
                    " away, and run the question again"
                ) from error
            found[name] = Answer(answer.tables, answer.figures, answer.numbers | _about(store.finished))
    return found


def _about(finished: Finished) -> dict[str, str]:
    """What is said of the runs of every question."""
    lines = list(finished)
    machines = sorted({f"{line.machine['cpu']}, torch {line.machine['torch']}" for line in lines})
    return {
        "runs": f"{len(lines):,}",
        "hours": f"{sum(line.seconds for line in lines) / 3600:.1f}",
        "machines": "; ".join(machines),
        "commits": ", ".join(sorted({str(line.machine["commit"]) for line in lines})),
    }


def page(found: Mapping[str, Answer], template: str) -> str:
    """The page as Markdown.

    Raises:
        ValueError: if the template has a placeholder that no answer fills.
    """
    texts = {}
    for name, answer in found.items():
        texts |= {f"{name}.{number}": text for number, text in answer.numbers.items()}
        texts |= {f"{name}.{table}": markdown(rows.header, rows.rows) for table, rows in answer.tables.items()}
    return filled(template, texts, "`python -m bench study` runs what is missing, in the folders named by --data too")


def checksum(path: Path) -> str:
    """Of the lines of a question."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(answer: Answer, lines: Path, folder: Path) -> None:
    """Write the figures of an answer as PNG, each with the checksum of the lines in its metadata."""
    from matplotlib.figure import Figure

    for name, (figure, height) in answer.figures.items():
        canvas = Figure(figsize=(WIDTH, height), layout="constrained")
        figure(canvas)
        canvas.savefig(folder / f"{lines.stem}-{name}.png", dpi=120, metadata={LINES: checksum(lines)})


def write(questions: Mapping[str, Question], results: Path, documentation: Path) -> Path:
    """Write the page and its figures into the folder of the documentation; the path of the page.

    Nothing is changed there before all of them are made.
    """
    found = answers(questions, results)
    text = page(found, TEMPLATE.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        for name, answer in found.items():
            draw(answer, results / f"{name}.jsonl", Path(scratch))
        shutil.copytree(scratch, documentation / FIGURES, dirs_exist_ok=True)
    path = documentation / PAGE
    path.write_text(text)
    return path
