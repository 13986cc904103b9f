"""Pages of the documentation that are made of results: a template with prose, filled in with numbers and tables."""

from __future__ import annotations

import string
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial

LINE_WIDTH = 120  # of the pages' Markdown


class Template(string.Template):
    """Placeholders such as ${follow.runs}."""

    idpattern = r"[a-z][a-z0-9_.]*"


def filled(template: str, texts: Mapping[str, str], remedy: str) -> str:
    """The template with the texts in their places, and its paragraphs filled anew.

    Args:
        remedy: what to do where a text is missing, for the ValueError that is raised then.
    """
    try:
        return wrapped(Template(template).substitute(texts))
    except KeyError as error:
        raise ValueError(f"the page needs {error}, which the results do not give: {remedy}") from error


def wrapped(text: str) -> str:
    """The text with the lines of its paragraphs filled anew, since numbers and their placeholders differ in length."""
    blocks = text.split("\n\n")
    fill = partial(textwrap.fill, width=LINE_WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(fill(block) if block[:1].isalpha() or block.startswith("**") else block for block in blocks)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
