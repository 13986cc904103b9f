"""The page of the study and its figures, made from the lines."""

import pytest
from matplotlib.image import imread
from squares import drawn_from, finish, line, squares

from bench.measuring.pages import wrapped
from bench.study import DOCUMENTATION, RESULTS
from bench.studying import report
from bench.studying.questions import load_all
from bench.studying.store import Store


def written(folder, template="${squares.runs} runs, the largest ${squares.largest}\n\n${squares.table}\n"):
    finish(folder, squares(3))
    return report.page(report.answers({"squares": squares(3)}, folder), template)


def test_page_has_the_numbers_and_tables_of_the_runs(tmp_path):
    table = "| n of squares | square |\n| --- | --- |\n| 0 | 0 |\n| 1 | 1 |\n| 2 | 4 |\n"
    assert written(tmp_path) == f"3 runs, the largest 4\n\n{table}"


def test_paragraphs_are_filled_anew_and_nothing_else():
    text = "\n\n".join(["# A title", "many words\n" * 20, "| a | b |\n| c | d |", "```sh\na\nb\n```", "- one\n- two"])
    lines = wrapped(text).splitlines()
    assert max(map(len, lines)) <= 120
    assert " ".join(lines).split() == text.split()
    assert lines[0] == "# A title"
    assert lines[2].startswith("many words many words")
    assert lines[-10:] == ["| a | b |", "| c | d |", "", "```sh", "a", "b", "```", "", "- one", "- two"]


def test_page_without_the_lines_of_a_question_fails(tmp_path):
    with pytest.raises(ValueError, match=r"the page needs 'squares\.smallest', which the results do not give"):
        written(tmp_path, "${squares.smallest}")


def test_figures_name_the_lines_that_they_show(tmp_path):
    finish(tmp_path, squares(3))
    (answer,) = report.answers({"squares": squares(3)}, tmp_path).values()
    lines = tmp_path / "squares.jsonl"
    report.draw(answer, lines, tmp_path)
    path = tmp_path / "squares-plot.png"
    assert imread(path).shape[:2] == (240, 1200)
    before = report.checksum(lines)
    assert drawn_from(path) == before
    Store(tmp_path, "squares").append(line(3, square=9))
    assert report.checksum(lines) != before


def test_page_of_the_documentation_agrees_with_the_lines():
    found = report.answers(load_all(), RESULTS)
    assert (DOCUMENTATION / report.PAGE).read_text() == report.page(found, report.TEMPLATE.read_text())


def test_figures_of_the_documentation_agree_with_the_lines():
    found = report.answers(load_all(), RESULTS)
    assert found
    for name, answer in found.items():
        for figure in answer.figures:
            path = DOCUMENTATION / report.FIGURES / f"{name}-{figure}.png"
            assert drawn_from(path) == report.checksum(RESULTS / f"{name}.jsonl")
