"""The comparison page: a template with prose, filled in with the tables of the records."""

from __future__ import annotations

from pathlib import Path

from ..measuring.pages import filled, markdown
from . import cells, cost, documented
from .cells import Footnotes
from .packages import PACKAGES

TEMPLATE = Path(__file__).with_name("comparison.md")


def versions(environment: dict) -> dict[str, str]:
    """The version of each package, by its name in the tables.

    Raises:
        ValueError: if the record lacks one.
    """
    installed = environment["packages"] | {"torch": environment["torch"].partition("+")[0]}
    missing = [package.distribution for package in PACKAGES.values() if package.distribution not in installed]
    if missing:
        about = "install bench/requirements.txt, and run `python -m bench compare`"
        raise ValueError(f"the record was made without {', '.join(missing)}: {about}")
    return {name: installed[package.distribution] for name, package in PACKAGES.items()}


def page(features: dict, steps: dict, template: str) -> str:
    """The page as Markdown.

    Args:
        features: the record of `python -m bench compare`.
        steps: that of the training steps, with the same packages.
        template: with placeholders.
    """
    measured, timed, notes = features["environment"], steps["environment"], Footnotes()
    known = versions(measured)
    if versions(timed) != known:
        raise ValueError(f"the steps were timed with {versions(timed)}, and the cases run with {known}: run both anew")
    gives = ["compared", *(package.gives for package in PACKAGES.values())]
    header = ["", *(f"{name} {version}" for name, version in known.items())]
    documented_header = ["", *(f"{name} {known.get(name, '')}".rstrip() for name in documented.COLUMNS)]
    texts = {
        "features": markdown(header, [gives, *cells.rows(features["cases"], notes)]),
        "cost": markdown(cost.HEADER, cost.rows(steps, notes)),
        "documented": markdown(documented_header, documented.rows()),
        "date": measured["date"],
        "python": measured["python"],
        "torch": measured["torch"],
        "transformers": measured["packages"]["transformers"],
        "commit": measured["commit"],
        "fastdp.commit": documented.COMMIT,
        "fastdp.date": documented.DATE,
    }
    texts |= {f"cost.{name}": timed[name] for name in ("date", "python", "torch", "commit", "threads", "cpu")}
    texts["footnotes"] = notes.markdown()
    return filled(template, texts, "bench/comparing/report.py has to name it")
