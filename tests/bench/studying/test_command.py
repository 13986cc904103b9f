"""The command `python -m bench study`."""

import subprocess
import sys

import pytest
from squares import drawn_from, line, seeds, squares

from bench import study
from bench.__main__ import main
from bench.study import DOCUMENTATION
from bench.studying import report
from bench.studying.store import Store


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
