"""The `spectrum` command, and the factories that it and others name."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from oracle import diffusion_matrix, per_sample_gradients

from rgd_ext import DiffusionMatrix
from rgd_ext.__main__ import main
from rgd_ext.commands import resolve
from rgd_ext.commands.spectrum import computation, report

SOURCE = """
import functools, torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.Dropout(), torch.nn.Linear(4, 3))

class Models:
    linear = functools.partial(torch.nn.Linear, 10, 3)
    large = functools.partial(torch.nn.Linear, 60_000, 3)

def pair():
    torch.manual_seed(1)
    return torch.randn(30, 10), torch.randint(3, (30,))

def loader():
    return [*zip(*(part.split(8) for part in pair()))]

def unsized():
    return type("Unsized", (), {"__iter__": lambda self: iter(loader())})()

def wide():
    return [(torch.randn(100, 60_000, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 3)]

def wide_few():
    return [(x[:4], y[:4]) for x, y in wide()]

def same():
    return torch.ones(5, 10), torch.zeros(5, dtype=torch.long)

def mismatched():
    return torch.ones(5, 9), torch.zeros(5, dtype=torch.long)

def triple():
    return (*pair(), 0)

def failing():
    raise ValueError("a mistake of mine")

def unreadable():
    return torch.load("no such file")

instance = torch.nn.Linear(10, 3)
"""


@pytest.fixture
def exact(mine):
    """Explicit eigenvalues of D, descending."""
    x, y = resolve.make(f"{mine}:pair", tuple, "a pair")
    model = resolve.make(f"{mine}:model", torch.nn.Module, "a model").eval()
    grads = per_sample_gradients(model, lambda output: torch.nn.functional.cross_entropy(output, y), [x])
    return torch.linalg.eigvalsh(diffusion_matrix(grads)).flip(0).numpy()


def run(mine, model="model", data="pair", *options):
    return main(["spectrum", f"{mine}:{model}", "--data", f"{mine}:{data}", *options])


@pytest.mark.parametrize("data", ["pair", "loader", "unsized"])
def test_table_and_figure_show_the_spectrum_of_an_explicit_matrix(data, mine, exact, capsys):
    assert run(mine, "model", data, "-k", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(None, 1) for line in lines[:5])
    assert {name: value.strip() for name, value in facts.items()}["d"] == "59"
    assert int(facts["N"]) == 30
    assert float(facts["trace"]) == pytest.approx(exact.sum(), rel=1e-4)
    assert float(facts["lambda_max"]) == pytest.approx(exact[0], rel=1e-4)
    assert facts["rank"].split() == ["22", "of", "at", "most", "29"]
    rows = np.array([line.split() for line in lines if line.split() and line.split()[0] in {"1", "2", "3"}], float)
    shares = 100 * exact[:3] / exact.sum()
    expected = np.stack([np.arange(1, 4), exact[:3], shares, shares.cumsum()], 1)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=0.006)
    assert lines[-1] == str(Path("rgd_spectrum.png").resolve())
    assert imread("rgd_spectrum.png").shape[:2] == (840, 1080)


def test_eigenvalues_end_with_the_rank(mine, capsys):
    # The three rows of a linear layer's gradient sum to zero under cross-entropy: 2 * 11 directions.
    assert run(mine, "Models.linear", "pair", "-k", "33") == 0
    out = capsys.readouterr().out
    assert "22 of at most 29" in out
    assert "\n     22 " in out
    assert "\n     23 " not in out
    assert out.count("100.00") == 1


def test_shares_are_cumulative_and_end_with_one(mine, exact):
    x, y = resolve.make(f"{mine}:pair", tuple, "a pair")
    model = resolve.make(f"{mine}:model", torch.nn.Module, "a model").eval()
    matrix = DiffusionMatrix.from_batch(model, torch.nn.CrossEntropyLoss(), x, y)
    found = computation.compute(matrix, 59)
    assert len(found.eigenvalues) == found.rank == 22
    np.testing.assert_allclose(found.shares, exact[:22].cumsum() / exact.sum(), rtol=1e-4)


def test_rank_is_a_bound_where_the_spectrum_is_known_in_part(mine, capsys):
    assert run(mine, "Models.large", "wide", "-k", "3") == 0
    assert "rank          at most 99" in capsys.readouterr().out


def test_rank_of_few_samples_is_known_however_many_weights(mine, capsys):
    assert run(mine, "Models.large", "wide_few", "-k", "5") == 0
    assert "rank          3 of at most 3" in capsys.readouterr().out


def test_criterion_is_chosen(mine, tmp_path, capsys):
    Path("regression.py").write_text("import torch\npair = lambda: (torch.eye(10)[:5], torch.zeros(5, 3))\n")
    assert main(["spectrum", f"{mine}:Models.linear", "--data", "regression:pair", "--loss", "torch.nn:MSELoss"]) == 0
    sys.modules.pop("regression")
    assert "of at most 4" in capsys.readouterr().out


def test_identical_samples_have_nothing_to_draw(mine, capsys):
    assert run(mine, "model", "same") == 0
    assert "D = 0" in capsys.readouterr().out
    assert not Path("rgd_spectrum.png").exists()


def test_long_computation_is_announced_unless_quiet(mine, capsys, monkeypatch):
    monkeypatch.setattr(report, "LONG", 0)
    assert run(mine, "model", "loader") == 0
    assert "d = 59: about 2 passes over the data in 0:00:00 (h:mm:ss), and" in capsys.readouterr().err
    assert run(mine, "Models.large", "wide", "-k", "1") == 0
    error = capsys.readouterr().err
    assert "about 30 passes" in error
    assert "(h:mm:ss), more where eigenvalues are close, and" in error
    assert run(mine, "model", "loader", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_checkpoint_is_used_again(mine, capsys):
    assert run(mine, "model", "loader", "--checkpoint", "saved") == 0
    first = capsys.readouterr().out
    saved = {path: path.stat().st_mtime_ns for path in Path("saved").glob("[!i]*.pt")}
    assert len(saved) == 2
    assert run(mine, "model", "loader", "--checkpoint", "saved") == 0
    assert capsys.readouterr().out == first
    assert saved == {path: path.stat().st_mtime_ns for path in saved}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("nothing", "pair", "there is no nothing in"),
        ("Models.nothing", "pair", "there is no nothing in"),
        ("instance", "pair", "is a Linear: name a function that returns it"),
        ("pair", "pair", "returned a tuple: return a torch.nn.Module"),
        ("Models.linear", "triple", "a tuple of 3"),
        ("unreadable", "pair", "No such file"),
    ],
)
def test_wrong_factories_are_one_line(model, data, message, mine, capsys):
    assert run(mine, model, data) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("rgd_spectrum.png").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "is no factory"),
        (":f", "is no factory"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("torch.no_such_module:f", "there is no module torch.no_such_module"),
        (
            "torch.nn:Linear",
            "takes arguments (missing a required argument: 'in_features'): name a function that needs none, and returns"
            " a loader",
        ),
        ("torch:randn", "takes arguments"),
        ("datetime:datetime.now", "returned a datetime: return a loader"),
    ],
)
def test_names_that_lead_nowhere_are_one_line(name, message, mine, capsys):
    assert main(["spectrum", f"{mine}:model", "--data", name]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_errors_of_the_package_are_one_line(mine, capsys):
    assert run(mine, "model", "pair", "-k", "60") == 1
    assert run(mine, "model", "pair", "--checkpoint", "saved") == 1
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize(
    ("model", "data", "error"), [("failing", "pair", ValueError), ("model", "mismatched", RuntimeError)]
)
def test_errors_of_the_users_code_keep_their_traceback(model, data, error, mine):
    with pytest.raises(error):
        run(mine, model, data)


def test_a_module_that_lacks_another_is_not_called_missing(mine):
    Path("needy.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main(["spectrum", "needy:model", "--data", f"{mine}:pair"])


@pytest.mark.parametrize("options", [["-k", "0"], ["--out", "x.pdf"], ["--out", "no/folder/x.png"]])
def test_bad_options_exit_with_2(options, mine):
    with pytest.raises(SystemExit) as error:
        run(mine, "model", "pair", *options)
    assert error.value.code == 2
