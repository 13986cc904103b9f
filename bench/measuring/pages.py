"""Pages of the documentation that are made of results: templates with prose, and tables in pages written by hand."""

from __future__ import annotations

import re
import string
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial

LINE_WIDTH = 120  # of the pages' Markdown
MARKED = re.compile(r"(<!-- (python -m [^\n]+) -->\n)(.*?)(<!-- end -->|<!-- python -m |\Z)", re.DOTALL)


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


def number(value: float) -> str:
    """A ratio as tables show it."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def refilled(page: str, made_by: Callable[[str], str | None]) -> str:
    """The page with new text between each mark `<!-- python -m ... -->` and the next `<!-- end -->`.

    Args:
        page: in Markdown.
        made_by: from the command that a mark names to the text, which ends a line; None leaves what is there.

    Raises:
        ValueError: if a mark has no end.
    """

    def replaced(found: re.Match[str]) -> str:
        mark, command, text, end = found.groups()
        if end != "<!-- end -->":
            raise ValueError(f"no <!-- end --> follows the mark of `{command}`: put one below its table")
        new = made_by(command)
        return mark + (text if new is None else new) + end

    return MARKED.sub(replaced, page)
