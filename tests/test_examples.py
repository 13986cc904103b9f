"""The programs in examples/ run, and print a table that shows what they say."""

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from data_files import idx_files, write, zipped

ROOT = Path(__file__).parents[1]
MNIST = "the folder of Fashion-MNIST"  # stands for small files like it


class Example(NamedTuple):
    """A program.

    Attributes:
        needs: the packages that it imports besides ours.
        short: the arguments of a short run.
        launcher: what starts it.
        shows: checks the rows of the table of a short run.
        is_of_a_trainer: whether it is short, and has the table that it prints in its docstring.
    """

    needs: list[str]
    short: list[str]
    launcher: tuple[str, ...] = ()
    shows: Callable[[list[list[str]]], None] = lambda rows: None
    is_of_a_trainer: bool = True


def resumed(rows):
    """The last row is that of a resumed run, and equals that of the whole run before it."""
    assert rows[-1][1:] == rows[-2][1:] != rows[-3][1:]


def equal(rows):
    assert all(row[1:] == rows[0][1:] for row in rows)


def only_adapters_changed(rows):
    model, with_adapters, without_adapters = ([float(loss) for loss in losses] for _, *losses in rows)
    assert without_adapters == model
    assert with_adapters[1] < model[1]


def exact_and_falling(rows):
    for _, _, error, first, last in rows:
        assert float(error) < 3e-3
        assert float(last) < float(first)


def falling(rows):
    assert float(rows[-1][1]) < float(rows[0][1])


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"
EXAMPLES = {
    "fashion_mnist": Example(["numpy"], [MNIST, "--epochs", "2"], shows=falling),
    "lightning_trainer": Example(["lightning", "sklearn"], [], shows=resumed),
    "transformers_trainer": Example(["transformers", "accelerate"], ["--steps", "4"], shows=resumed),
    "accelerate_loop": Example(["accelerate", "sklearn"], [], shows=equal),
    "peft_lora": Example(["peft", "transformers"], ["--steps", "10"], shows=only_adapters_changed),
    "timm_models": Example(["torchvision", "timm"], ["--steps", "12"], shows=exact_and_falling),
    "distributed": Example([], ["--epochs", "2"], TORCHRUN),
    "upgrad": Example(["sklearn", "torchjd", "quadprog", "qpsolvers"], ["--steps", "5"]),
    "poisson": Example([], ["--steps", "2"], is_of_a_trainer=False),
    "suspicious_labels": Example(["sklearn"], ["--epochs", "1"], is_of_a_trainer=False),
}

PROJECTS = {"sklearn": "scikit-learn"}  # where the project of a package has another name
OF_OTHERS = {"numpy", "quadprog", "qpsolvers"}  # what rgd_ext and torchjd[quadprog-projector] install


def table_of(name, *arguments):
    """The rows that an example prints, split into cells; skips where it needs what is not installed."""
    for package in EXAMPLES[name].needs:
        pytest.importorskip(package)
    result = subprocess.run(command_of(name, *arguments), stderr=subprocess.PIPE, **SURROUNDINGS)
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]


VARIABLES = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SURROUNDINGS = {"env": os.environ | VARIABLES, "cwd": ROOT, "stdout": subprocess.PIPE, "text": True}


def command_of(name, *arguments):
    return [sys.executable, *EXAMPLES[name].launcher, f"examples/{name}.py", *arguments]


@pytest.fixture(scope="session")
def mnist(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("mnist"), zipped(idx_files())))


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_an_example_prints_a_table_of_numbers(path, mnist):
    example = EXAMPLES[path.stem]
    head, *rows = table_of(path.stem, *(mnist if argument == MNIST else argument for argument in example.short))
    assert len(rows) > 1
    for _, *numbers in rows:
        assert len(numbers) == len(rows[0]) - 1
        assert all(float(number.rstrip("%")) >= 0 for number in numbers)
    example.shows(rows)
    if example.is_of_a_trainer:
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert head in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_has_to_be_installed(name):
    text = ast.get_docstring(ast.parse((ROOT / f"examples/{name}.py").read_text()))
    for package in {*EXAMPLES[name].needs} - OF_OTHERS:
        assert re.search(rf"needs .*\b{PROJECTS.get(package, package)}\b", text)


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.is_of_a_trainer])
def test_an_example_of_a_trainer_is_short(name):
    assert len((ROOT / f"examples/{name}.py").read_text().splitlines()) <= 60


def test_poisson_is_solved_better_than_by_adam():
    _, gauss_newton, adam = table_of("poisson", "--steps", "25")
    assert float(gauss_newton[-1]) < 1e-3 < float(adam[-1])


def test_upgrad_increases_no_loss_by_more_than_it_says():
    _, mean, upgrad = table_of("upgrad", "--steps", "40")
    assert float(mean[-1].rstrip("%")) > 5
    assert float(upgrad[-1].rstrip("%")) < 0.1


def test_suspicious_labels_compares_its_scores_as_the_documentation_does():
    rows = table_of("suspicious_labels", "--epochs", "6")[1:]
    areas = {name: float(last.rstrip("%")) for name, *_, last in rows}
    assert min(areas["loss"], areas["margin"], areas["gradient-norm"]) > 97
    assert 80 < areas["validation-cosine"] < areas["gradient-norm"]
    assert areas["batch-cosine"] < 50


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc, to find a process")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_a_training_goes_on_along_its_trajectory_after_a_process_was_killed(tmp_path):
    arguments = "--epochs", "4", "--checkpoint", str(tmp_path / "run.pt")
    expected = table_of("distributed", *arguments[:2])
    with subprocess.Popen(command_of("distributed", *arguments), stderr=subprocess.DEVNULL, **SURROUNDINGS) as agent:
        lines = [agent.stdout.readline() for _ in range(3)]
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        lines += agent.stdout.readlines()
        assert agent.wait() == 0
    assert [line.split() for line in lines] == expected
