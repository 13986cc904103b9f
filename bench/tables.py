"""Tables in README.md and docs, from the records in bench/results.

Fills in what stands below each mark of the form `<!-- python -m bench tables: KIND FOLDER [TEXT ...] -->`, up to the
next `<!-- end -->`. KIND is a benchmark, FOLDER that of a machine, which has KIND.json or KIND-*.json, and the table
has only cases with a TEXT in their name, in the order of the texts.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from .measuring.pages import markdown, refilled
from .tabulating import goals, gradients, processes, training
from .tabulating.columns import Cell, table
from .tabulating.records import chosen, records

ROOT = Path(__file__).parents[1]
RESULTS, COMMAND = ROOT / "bench" / "results", "python -m bench tables: "
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

Kind = Callable[[Path, Sequence[str]], str]


def add(commands) -> None:
    """Declare the command."""
    command = commands.add_parser("tables", help=__doc__.partition("\n")[0], description=__doc__)
    command.set_defaults(run=run)


def run() -> list[str]:
    """Write the pages whose tables have changed; returns what failed."""
    failures = []
    for page in PAGES:
        text = page.read_text()
        try:
            new = refilled(text, made_by)
        except ValueError as problem:
            failures.append(f"{page.relative_to(ROOT)}: {problem}")
            continue
        if new != text:
            page.write_text(new)
            print(f"wrote {page.relative_to(ROOT)}")
    return failures


def made_by(command: str) -> str | None:
    """The table that a mark asks for; None for a mark of another command.

    Raises:
        ValueError: if there is no such kind, record or case.
    """
    if not command.startswith(COMMAND):
        return None
    try:
        kind, folder, *only = shlex.split(command.removeprefix(COMMAND))
    except ValueError as problem:
        raise ValueError(f"`{command}` is not of the form KIND FOLDER [TEXT ...] ({problem})") from problem
    if kind not in KINDS:
        raise ValueError(f"there is no table {kind!r}: choose one of {', '.join(KINDS)}")
    return KINDS[kind](RESULTS / folder, only or [""]) + "\n"


def of_models(benchmark: str, columns: dict[str, Cell]) -> Kind:
    """The kind of table that has a row for each model of a benchmark."""

    def made(folder: Path, only: Sequence[str]) -> str:
        models = [model for record in records(folder, benchmark) for model in record["models"]]
        return table(columns, chosen(models, "model", only))

    return made


def predictions(folder: Path, only: Sequence[str]) -> str:
    """Steps in several processes, as predicted and as measured."""
    models = [model for record in records(folder, "distributed") for model in record["models"] if model["predicted"]]
    return table(processes.PREDICTED, chosen(models, "model", only))


def direction(folder: Path, only: Sequence[str]) -> str:
    """The direction from materialised gradients, each case with the ceilings of its own record."""
    found = records(folder, "kernels")
    cases = [case | {"ceilings": record["ceilings"]} for record in found for case in record["cases"]]
    on_cuda = all("copy" in record["ceilings"] for record in found)
    return table(gradients.ON_CUDA if on_cuda else gradients.DIRECTION, chosen(cases, "case", only))


KINDS: dict[str, Kind] = {
    "steps": of_models("steps", training.STEPS),
    "kernels": direction,
    "compile": of_models("compile", training.COMPILE),
    "observe": of_models("observe", training.OBSERVE),
    "torchjd": of_models("torchjd", training.TORCHJD),
    "distributed": of_models("distributed", processes.MEASURED),
    "predictions": predictions,
    "goals": lambda folder, only: markdown(goals.HEADER, goals.rows(folder)),
}
