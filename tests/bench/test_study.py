"""The frame of the study: lines on disk, runs that several processes share, and the page made from the lines."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
from matplotlib.image import imread
from PIL import Image

from bench import study
from bench.__main__ import main
from bench.study import DOCUMENTATION, RESULTS
from bench.studying import report, runner
from bench.studying.data import Sources
from bench.studying.question import Answer, Line, Question, Scope, Table
from bench.studying.questions import load_all
from bench.studying.runner import work
from bench.studying.store import Store

MACHINE = {"torch": "2", "commit": "c", "cpu": "a processor"}
SCOPE = Scope(quick=True, data=("digits",))
fork = multiprocessing.get_context("fork")


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


def test_lines_are_read_as_they_were_written(tmp_path):
    writer, reader = Store(tmp_path, "squares"), Store(tmp_path, "squares")
    for seed in range(3):
        writer.append(line(seed, curve=[1.0, 2.5], name="a"))
        reader.refresh()
        assert len(reader.finished) == seed + 1
    assert reader.finished[{"seed": 1}] == line(1, curve=[1.0, 2.5], name="a")
    assert {"seed": 2} in reader.finished
    assert {"seed": 3} not in reader.finished


def test_order_of_the_entries_of_a_configuration_does_not_matter(tmp_path):
    store = Store(tmp_path, "squares")
    store.append(Line({"a": 1, "b": 2}, {}, 1.0, MACHINE))
    assert {"b": 2, "a": 1} in store.finished
    assert store.finished.grouped("b") == {(2,): list(store.finished)}


def test_line_that_was_cut_off_is_dropped(tmp_path):
    store = Store(tmp_path, "squares")
    store.append(line(0))
    with store.path.open("a") as file:
        file.write('{"config": {"seed": 1}, "outc')
    other = Store(tmp_path, "squares")
    other.refresh()
    assert {"seed": 1} not in other.finished
    other.append(line(2))
    assert seeds(tmp_path) == [0, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no JSON", "Expecting value"),
        ("[1, 2]", "must be a mapping"),
        ('{"config": {}, "outcome": {}, "seconds": 1.0}', "missing 1 required"),
        ('{"config": 1, "outcome": {}, "seconds": 1.0, "machine": {}}', "have to be objects"),
    ],
)
def test_line_that_is_no_run_is_named(tmp_path, text, problem):
    store = Store(tmp_path, "squares")
    store.append(line(0))
    with store.path.open("a") as file:
        file.write(text + "\n")
    with pytest.raises(ValueError, match=rf"{store.path}, line 2 is no finished run \(.*{problem}.*\): delete it"):
        Store(tmp_path, "squares").refresh()


def test_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "squares.jsonl"
    path.write_text("notes, without an end of the line")
    with pytest.raises(ValueError, match=rf"{path} is no file of the study"):
        Store(tmp_path, "squares").append(line(0))
    assert path.read_text() == "notes, without an end of the line"


def test_file_that_becomes_shorter_stops_the_study(tmp_path):
    store = Store(tmp_path, "squares")
    store.append(line(0))
    store.path.write_text("")
    with pytest.raises(ValueError, match="has become shorter while the study ran"):
        store.refresh()


def test_numbers_keep_six_digits(tmp_path):
    store = Store(tmp_path, "squares")
    store.append(line(0, value=[1 / 3, {"large": 123456.789}], count=12345678))
    assert store.finished[{"seed": 0}].outcome == {"value": [0.333333, {"large": 123457.0}], "count": 12345678}


def test_a_run_that_fails_is_named_and_leaves_no_line(tmp_path):
    def fails(config, sources):
        return {"value": float("nan") if config["seed"] == 1 else 0.0}

    with pytest.raises(RuntimeError, match=r"the run \{'seed': 1\} failed: Out of range float"):
        finish(tmp_path, squares(run=fails))
    assert seeds(tmp_path) == [0]


def test_a_run_is_not_repeated(tmp_path):
    calls = []
    question = squares(3, run=lambda config, sources: calls.append(config) or {})
    finish(tmp_path, question)
    finish(tmp_path, question)
    assert len(calls) == 3


def test_later_runs_may_depend_on_earlier_ones(tmp_path):
    def plan(finished, scope):
        best = max((each.outcome["square"] for each in finished if each.config["seed"] < 4), default=None)
        return [{"seed": seed} for seed in range(4)] + ([] if len(finished) < 4 else [{"seed": best}])

    question = squares()
    finish(tmp_path, Question(question.title, plan, question.run, question.answer))
    assert seeds(tmp_path) == [0, 1, 2, 3, 9]


def test_process_that_waits_for_others_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "WAIT", 0.01)
    process = start(tmp_path, squares(1, seconds=1))
    while not list(tmp_path.glob("*.lock")):
        time.sleep(0.01)
    time.sleep(0.2)
    finish(tmp_path, squares(1))
    process.join(30)
    assert capsys.readouterr().err.count("squares: waiting for 1 runs of other processes") == 1
    assert seeds(tmp_path) == [0]


def test_run_that_is_to_be_alone_waits_for_those_of_other_questions(tmp_path):
    def alone(config, sources):
        assert (tmp_path / "squares.jsonl").exists()
        return {}

    process = start(tmp_path, squares(1, seconds=1))
    while not (tmp_path / "running.lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    question = squares(1, run=alone)
    work(replace(question, alone=True), Store(tmp_path, "times"), SCOPE, Sources())
    process.join(30)


def start(folder, question):
    process = fork.Process(target=partial(finish, folder, question))
    process.start()
    return process


def test_processes_share_the_runs(tmp_path):
    processes = [start(tmp_path, squares(20, seconds=0.05)) for _ in range(3)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(seeds(tmp_path)) == list(range(20))
    store = Store(tmp_path, "squares")
    store.refresh()
    assert {each.outcome["process"] for each in store.finished} == {process.pid for process in processes}


def test_study_that_is_killed_goes_on_where_it_was(tmp_path):
    process = start(tmp_path, squares(20, seconds=0.1))
    while not (tmp_path / "squares.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    before = seeds(tmp_path)
    assert 0 < len(before) < 20
    finish(tmp_path, squares(20))
    assert seeds(tmp_path)[: len(before)] == before
    assert sorted(seeds(tmp_path)) == list(range(20))


def test_progress_tells_the_time_that_is_left(tmp_path, capsys):
    finish(tmp_path, squares(2))
    assert "squares: 1 of 2 runs, 0.0 minutes left" in capsys.readouterr().err


def drawn_from(path):
    """The checksum in a figure."""
    with Image.open(path) as image:
        return image.info[report.LINES]


def written(folder, template="${squares.runs} runs, the largest ${squares.largest}\n\n${squares.table}\n"):
    finish(folder, squares(3))
    return report.page(report.answers({"squares": squares(3)}, folder), template)


def test_page_has_the_numbers_and_tables_of_the_runs(tmp_path):
    table = "| n of squares | square |\n| --- | --- |\n| 0 | 0 |\n| 1 | 1 |\n| 2 | 4 |\n"
    assert written(tmp_path) == f"3 runs, the largest 4\n\n{table}"


def test_paragraphs_are_filled_anew_and_nothing_else():
    text = "\n\n".join(["# A title", "many words\n" * 20, "| a | b |\n| c | d |", "```sh\na\nb\n```", "- one\n- two"])
    lines = report.wrapped(text).splitlines()
    assert max(map(len, lines)) <= 120
    assert " ".join(lines).split() == text.split()
    assert lines[0] == "# A title"
    assert lines[2].startswith("many words many words")
    assert lines[-10:] == ["| a | b |", "| c | d |", "", "```sh", "a", "b", "```", "", "- one", "- two"]


def test_page_without_the_lines_of_a_question_fails(tmp_path):
    with pytest.raises(ValueError, match=r"the page needs 'squares\.smallest', which the lines do not give"):
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


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `python -m bench study ARGUMENTS` with one question, in folders of its own."""
    monkeypatch.setattr(study, "NAMES", ("squares",))
    monkeypatch.setattr(study, "load", lambda name: squares(3))
    monkeypatch.setattr(study, "load_all", lambda: {"squares": squares(3)})
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "DOCUMENTATION", tmp_path)
    (tmp_path / "template.md").write_text("${squares.largest}\n")
    monkeypatch.setattr(report, "TEMPLATE", tmp_path / "template.md")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["bench", "study", *arguments])
        main()

    return run


def test_command_runs_the_questions_and_prints_their_tables(command, tmp_path, capsys):
    command("squares")
    assert sorted(seeds(tmp_path / "results")) == [0, 1, 2]
    assert "n of squares" in capsys.readouterr().out


def test_quick_lines_are_not_kept(command, tmp_path, capsys):
    command("--quick")
    assert "n of squares" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_quick_lines_are_kept_apart(command, tmp_path):
    command("--quick", "--results", str(tmp_path))
    assert sorted(seeds(tmp_path / "quick")) == [0, 1, 2]
    assert not (tmp_path / "squares.jsonl").exists()


def test_report_that_fails_changes_nothing(command, tmp_path, monkeypatch):
    command()
    command("report")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(report, "checksum", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("report")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("option", [["--quick"], ["--data", "folder"]])
def test_report_takes_no_options_of_runs(command, option):
    with pytest.raises(SystemExit, match="leave out --quick and --data"):
        command("report", *option)


def test_lines_of_another_version_are_named(command, tmp_path):
    Store(tmp_path / "results", "squares").append(line(0, cube=0))
    with pytest.raises(SystemExit, match=r"squares\.jsonl has no 'square', so another version of the study wrote it"):
        command("report")


def test_results_that_are_no_folder_are_named(command, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=rf"{tmp_path}/file"):
        command("--results", str(tmp_path / "file"))


def test_other_benchmarks_need_neither_scipy_nor_scikit_learn():
    code = "import sys; sys.modules |= {'scipy': None, 'sklearn': None, 'matplotlib': None}; import bench.__main__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DOCUMENTATION.parent)


@pytest.mark.parametrize("package", ["scipy", "sklearn"])
def test_package_that_is_missing_is_named(package):
    code = f"import sys; sys.modules['{package}'] = None; sys.argv = ['bench', 'study', '--quick']"
    command = [sys.executable, "-c", f"{code}; import bench.__main__ as bench; bench.main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=DOCUMENTATION.parent)
    assert done.returncode == 1
    assert "the study needs scikit-learn, scipy, matplotlib and rich" in done.stderr.splitlines()[-1]


def test_report_writes_the_page_and_its_figures(command, tmp_path, capsys):
    command()
    command("report")
    assert (tmp_path / "study.md").read_text() == "4\n"
    assert drawn_from(tmp_path / "study" / "squares-plot.png") == report.checksum(
        tmp_path / "results" / "squares.jsonl"
    )
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "study.md")


def test_folder_without_data_is_named(command, tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path} holds no known data set"):
        command("--data", str(tmp_path))


def test_interrupted_study_says_how_to_go_on(command, monkeypatch, tmp_path):
    def interrupted(config, sources):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "load", lambda name: squares(3, run=interrupted))
    with pytest.raises(SystemExit, match=rf"interrupted: finished runs are in {tmp_path}.*the same command goes on"):
        command()
