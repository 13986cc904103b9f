"""The `plan` command: the plan of a model that a factory returns, for a batch that one returns."""

import pytest

from rgd_ext.__main__ import main

SOURCE = """
import torch

def model():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))

def both():
    return model(), torch.randn(5, 3, 8, 8), torch.zeros(5)

def batch():
    return torch.randn(5, 3, 8, 8), torch.zeros(5)

def loader():
    return [batch(), batch()]

def empty():
    return []

def named():
    return {"input": torch.randn(5, 3, 8, 8)},

def wrong():
    return 3, 4
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"planned_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    return name


@pytest.mark.parametrize("data", [None, "batch", "loader", "named"])
def test_command_prints_the_plan(mine, data, capsys):
    arguments = ["plan", f"{mine}:model", "--data", f"{mine}:{data}"] if data else ["plan", f"{mine}:both"]
    assert main([*arguments, "--policy", "rayleigh", "--memory-budget", "1000000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "2", "total:", "measured:"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "without a batch"),
        (["wrong"], "starts with a int"),
        (["model", "--data", "empty"], "without batches"),
        (["both", "--memory-budget", "10"], "at least memory_budget="),
        (["missing"], "missing"),
    ],
)
def test_command_says_what_is_wrong(mine, arguments, message, capsys):
    arguments = [f"{mine}:{a}" if a.isalpha() and a in SOURCE + "missing" else a for a in arguments]
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err
