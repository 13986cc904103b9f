"""The cells of the table of features, and the footnotes that say more."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from ..measuring.pages import LINE_WIDTH
from .attempts import ABSENT, EXACT, LONGEST, OTHER, REFUSED, WRONG, Attempt
from .packages import PACKAGES
from .reference import CONTRIBUTIONS, JACOBIAN, TOKENS

# What rows stand for that are no gradients of samples, in the table and in a footnote.
MEANINGS = {
    CONTRIBUTIONS: ("contributions", "contributions of the samples to the gradient of the batch"),
    JACOBIAN: ("Jacobian", "gradients of the losses of the samples in this batch"),
    TOKENS: ("by token", "the same with each token for a sample"),
}


class Footnotes:
    """Numbered texts, each kept once."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str) -> str:
        """The mark of a text; empty for an empty one."""
        if not text:
            return ""
        if text not in self._texts:
            self._texts.append(text)
        return f"[^{self._texts.index(text) + 1}]"

    def markdown(self) -> str:
        notes = (f"[^{number}]: {text}" for number, text in enumerate(self._texts, 1))
        fill = {"width": LINE_WIDTH, "subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
        return "\n".join(textwrap.fill(note, **fill) for note in notes)


def short(attempt: Attempt, success: str) -> str:
    """An attempt in a few words, for the table."""
    if attempt.another_model:
        return "of another model"
    if attempt.outcome == EXACT:
        return success
    if attempt.outcome == OTHER:
        return MEANINGS[attempt.meaning][0] if attempt.meaning in MEANINGS else "changed"
    if attempt.outcome == WRONG:
        return "wrong" if attempt.error is None else f"wrong: {attempt.error:.2g}"
    return {REFUSED: "refused", ABSENT: "-"}[attempt.outcome]


def long(attempt: Attempt, success: str) -> str:
    """An attempt in a few words, for a footnote."""
    text = short(attempt, success)
    if attempt.outcome == REFUSED:
        text = f"refused, {code(attempt.about)}"
    elif attempt.outcome == ABSENT:
        text = attempt.about
    elif attempt.outcome == OTHER:
        text = MEANINGS[attempt.meaning][1] if attempt.meaning in MEANINGS else f"now {code(attempt.meaning)}"
    elif attempt.another_model:
        text = "exact, of a model with other outputs"
    elif attempt.outcome == WRONG and attempt.error is None:
        text = "wrong, of another shape or not finite"
    return f"{text}, with a warning, {code(attempt.warned)}" if attempt.warned and attempt.outcome != EXACT else text


def code(text: str) -> str:
    """The text as code in a table or a footnote, without the word in which it was cut off."""
    if len(text.partition(": ")[2]) >= LONGEST or len(text) == LONGEST:
        text = f"{text.rpartition(' ')[0]} …"
    return f"`{text.replace('`', chr(39))}`"


def cell(attempts: Mapping[str, Attempt], success: str, notes: Footnotes) -> str:
    """What the first way gives, whether another one is better, and the mark of the footnote with both."""
    (_, first), *others = attempts.items()
    better = max(others, key=lambda other: rank(other[1]), default=None)
    text, told = short(first, success), long(first, success)
    if better and rank(better[1]) > rank(first):
        text += f", {short(better[1], success)} by option"
        told += f"; by {better[0]}: {long(better[1], success)}"
    elif others:
        told += f"; no better by {', '.join(way for way, _ in others)}"
    return text + ("" if first.outcome == EXACT else notes.mark(told))


def rank(attempt: Attempt) -> int:
    """How much an attempt gives of what was asked for; the first of equal ones is taken."""
    if attempt.outcome == EXACT:
        return 1 if attempt.another_model else 2
    return int(attempt.outcome == OTHER)


def rows(results: list[dict], notes: Footnotes) -> list[list[str]]:
    """The table of features, from the JSON of the results."""
    found = []
    for result in results:
        cells = []
        for package in PACKAGES:
            attempts = {way: Attempt(**attempt) for way, attempt in result["attempts"][package].items()}
            cells.append(cell(attempts, result["success"], notes))
        found.append([result["case"], *cells])
    return found
