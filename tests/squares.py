"""A question of the study whose runs are the squares of some numbers: its lines, and what a figure says of them."""

import os
import time

from PIL import Image

from bench.studying import report
from bench.studying.data import Sources
from bench.studying.question import Answer, Line, Question, Scope, Table
from bench.studying.runner import work
from bench.studying.store import Store

MACHINE = {"torch": "2", "commit": "c", "cpu": "a processor"}
SCOPE = Scope(quick=True, data=("digits",))


def line(seed, **outcome):
    return Line({"seed": seed}, outcome, 1.0, MACHINE)


def squares(count=20, seconds=0.0, run=None):
    """A question whose runs are the squares of some numbers."""

    def square(config, sources):
        time.sleep(seconds)
        return {"square": config["seed"] ** 2, "process": os.getpid()}

    def answer(finished):
        rows = [[str(each.config["seed"]), str(each.outcome["square"])] for each in finished]
        return Answer(
            {"table": Table(("n of squares", "square"), rows)}, {"plot": (draw, 2.0)}, {"largest": rows[-1][1]}
        )

    def draw(figure):
        figure.subplots().plot([0, 1])

    return Question("squares", lambda *_: [{"seed": seed} for seed in range(count)], run or square, answer)


def finish(folder, question):
    work(question, Store(folder, "squares"), SCOPE, Sources())


def seeds(folder):
    """The seeds of all lines in the file, in their order."""
    store = Store(folder, "squares")
    lines = store.path.read_text().splitlines()
    store.refresh()
    assert len(lines) == len(store.finished)
    return [each.config["seed"] for each in store.finished]


def drawn_from(path):
    """The checksum in a figure."""
    with Image.open(path) as image:
        return image.info[report.LINES]
