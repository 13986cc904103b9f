"""The `noise` command: the gradient noise scale of each parameter and module."""

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from oracle import per_sample_gradients
from torch.nn.functional import cross_entropy

from rgd_ext.__main__ import main
from rgd_ext.commands import resolve
from rgd_ext.commands.noise import figure, measurement

SOURCE = """
import torch

def model():
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(), torch.nn.Tanh())
    return torch.nn.Sequential(inner, torch.nn.Linear(6, 3)).double()

def loader():
    torch.manual_seed(1)
    return [(torch.randn(n, 6).double(), torch.randint(3, (n,))) for n in (8, 5, 1, 7)]

def batch():
    return loader()[0]

def single():
    return loader()[2:3]

def same():
    return torch.ones(5, 6).double(), torch.zeros(5, dtype=torch.long)

def triple():
    return (*batch(), 0)

def tensors():
    return [x for x, _ in loader()]

def summed():
    return torch.nn.CrossEntropyLoss(reduction="sum")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The name of a module in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(SOURCE)
    yield name
    sys.modules.pop(name, None)


def run(mine, data="loader", *options):
    return main(["noise", f"{mine}:model", "--data", f"{mine}:{data}", *options])


def expected(mine, batches):
    """For each parameter its name and the means of the unbiased estimates of tr Sigma and |mu|^2, from definitions."""
    model = resolve.make(f"{mine}:model", torch.nn.Module, "a model").eval()
    sums = 0
    for x, y in batches:
        rows = per_sample_gradients(model, lambda output, y=y: cross_entropy(output, y), [x])
        parts = rows.split([p.numel() for p in model.parameters()], 1)
        traces = torch.stack([part.var(0, correction=1).sum() for part in parts])
        norms = torch.stack([part.mean(0).square().sum() for part in parts])
        sums = sums + torch.stack([traces, norms - traces / len(x)], 1)
    return dict(zip([name for name, _ in model.named_parameters()], (sums / len(batches)).tolist(), strict=True))


def cells(out):
    """The rows of the table by their first cells, which may be the same for several rows."""
    lines = [line.split() for line in out.splitlines() if line.strip()]
    start = next(i for i, line in enumerate(lines) if line[0].startswith("─"))
    return [line for line in lines[start + 1 :] if len(line) == 6]


def measured(mine, data, batches=10):
    model = resolve.make(f"{mine}:model", torch.nn.Module, "a model")
    return measurement.measure(model, torch.nn.CrossEntropyLoss(), resolve.make(f"{mine}:{data}", object, ""), batches)


@pytest.mark.parametrize(
    ("data", "batches", "taken"), [("loader", 10, [0, 1, 3]), ("loader", 2, [0, 1]), ("batch", 10, [0])]
)
def test_estimates_are_means_over_batches(data, batches, taken, mine):
    loader = resolve.make(f"{mine}:loader", list, "a loader")
    want = expected(mine, [loader[i] for i in taken])
    found = measured(mine, data, batches)
    assert found.batch_sizes == [len(loader[i][1]) for i in taken]
    assert [row.name for row in found.rows] == ["", "0", "0.0", "0.0.weight", "0.0.bias", "1", "1.weight", "1.bias"]
    for row in found.rows:
        inside = [
            pair for name, pair in want.items() if name == row.name or not row.name or name.startswith(f"{row.name}.")
        ]
        trace, squared = map(sum, zip(*inside, strict=True))
        assert row.is_module == (row.name not in want)
        assert row.trace == pytest.approx(trace, rel=1e-9)
        assert row.squared_grad_norm == pytest.approx(squared, rel=1e-9)
        assert row.noise_scale == (pytest.approx(trace / squared) if squared > 0 else None)
    assert found.rows[0].elements == 63


def test_the_table_shows_what_was_measured(mine, capsys):
    assert run(mine) == 0
    out = capsys.readouterr().out
    rows = measured(mine, "loader").rows
    table = cells(out)
    assert [line[0] for line in table] == ["(model)", "0", "0", "weight", "bias", "1", "weight", "bias"]
    for line, row in zip(table, rows, strict=True):
        assert int(line[1]) == row.elements
        assert float(line[3]) == pytest.approx(row.trace, rel=1e-3)
        assert float(line[4]) == pytest.approx(100 * row.trace / rows[0].trace, abs=0.06)
        assert (line[5] == "-") == (row.noise_scale is None)
        if row.noise_scale is not None:
            assert float(line[5]) == pytest.approx(row.noise_scale, rel=1e-3)
    assert "Batches: 3, samples: 20." in out
    assert out.splitlines()[-1] == str(Path("rgd_noise.png").resolve())
    assert imread("rgd_noise.png").shape[1] == 1200


def test_the_reduction_of_the_criterion_does_not_matter(mine, capsys):
    assert run(mine) == 0
    mean = capsys.readouterr().out
    assert run(mine, "loader", "--loss", f"{mine}:summed") == 0
    assert capsys.readouterr().out == mean


def test_identical_samples_have_no_noise(mine, capsys):
    assert run(mine, "same") == 0
    model, *_ = cells(capsys.readouterr().out)
    assert float(model[3]) == pytest.approx(0, abs=1e-20)
    assert Path("rgd_noise.png").exists()


def test_many_parameters_are_drawn_by_layer():
    def row(name, is_module):
        return measurement.Row(name, is_module, 1, 1.0, 1.0)

    rows = [row("", True)]
    for i in range(figure.MOST_BARS // 2 + 1):
        rows += [row(f"{i}", True), row(f"{i}.weight", False), row(f"{i}.bias", False)]
    assert [each.name for each in figure._shown(rows)] == [row.name for row in rows if row.is_module][1:]
    assert [each.name for each in figure._shown(rows[:-3])] == [row.name for row in rows[:-3] if not row.is_module]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("single", "no batch of two samples or more"),
        ("triple", "a tuple of 3: return a pair (x, y)"),
        ("tensors", "gives a Tensor: return a pair"),
    ],
)
def test_wrong_data_is_one_line(data, message, mine, capsys):
    assert run(mine, data) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("rgd_noise.png").exists()
