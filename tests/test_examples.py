"""The programs in examples/ run and print a table."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]


class Example(NamedTuple):
    """The packages that a program imports besides ours, the arguments of a short run, and what starts the program."""

    needs: list[str]
    short: list[str]
    launcher: tuple[str, ...] = ()


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"
EXAMPLES = {
    "distributed": Example([], ["--epochs", "2"], TORCHRUN),
    "upgrad": Example(["sklearn", "torchjd", "quadprog", "qpsolvers"], ["--steps", "5"]),
    "poisson": Example([], ["--steps", "2"]),
    "suspicious_labels": Example(["sklearn"], ["--epochs", "1"]),
}


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


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_an_example_prints_a_table_of_numbers(path):
    _, *rows = table_of(path.stem, *EXAMPLES[path.stem].short)
    assert len(rows) > 1
    for _, *numbers in rows:
        assert len(numbers) == len(rows[0]) - 1
        assert all(float(number.rstrip("%")) >= 0 for number in numbers)


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
