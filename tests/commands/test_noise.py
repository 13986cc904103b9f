"""The `noise` command: the gradient noise scale of each parameter and module."""

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

def listed():
    return list(loader()[0])

def single():
    return loader()[2:3]

def same():
    return torch.ones(5, 6).double(), torch.zeros(5, dtype=torch.long)

def triple():
    return (*batch(), 0)

def tensors():
    return [x for x, _ in loader()]

class Partly(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 3).double()

    def forward(self, x):
        return self.layer(x) if len(x) == 8 else x[:, :3]

def partly():
    torch.manual_seed(0)
    return Partly()

class WithOwnWeight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3).double())

    def forward(self, output, y):
        return torch.nn.functional.cross_entropy(output * self.weight, y)

class Root(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = torch.nn.ModuleDict({"$x^$": torch.nn.Linear(6, 3).double()})
        self.raw = torch.nn.Parameter(torch.zeros(3).double())

    def forward(self, x):
        return self.inside["$x^$"](x) + self.raw.square().sqrt()

def unusual():
    root = Root()
    root.raw.data += 1
    return root

def summed():
    return torch.nn.CrossEntropyLoss(reduction="sum")
"""


def run(mine, data="loader", *options):
    return main(["noise", f"{mine}:model", "--data", f"{mine}:{data}", *options])


def expected(mine, batches):
    """For each parameter its name and unbiased estimates of tr Sigma and |mu|^2 from all samples, from definitions."""
    model = resolve.make(f"{mine}:model", torch.nn.Module, "a model").eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    rows = per_sample_gradients(model, lambda output: cross_entropy(output, y), [x])
    parts = rows.split([p.numel() for p in model.parameters()], 1)
    traces = [part.var(0, correction=1).sum().item() for part in parts]
    squares = [part.mean(0).square().sum().item() - trace / len(x) for part, trace in zip(parts, traces, strict=True)]
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, zip(traces, squares, strict=True), strict=True))


def cells(out):
    """The cells of each row of the table."""
    lines = [line.split() for line in out.splitlines() if line.strip()]
    start = next(i for i, line in enumerate(lines) if line[0].startswith("─"))
    return [line for line in lines[start + 1 :] if len(line) == 6]


def measured(mine, data, batches=10):
    model = resolve.make(f"{mine}:model", torch.nn.Module, "a model")
    return measurement.measure(model, torch.nn.CrossEntropyLoss(), resolve.make(f"{mine}:{data}", object, ""), batches)


@pytest.mark.parametrize(
    ("data", "batches", "taken"),
    [("loader", 10, [0, 1, 2, 3]), ("loader", 2, [0, 1]), ("batch", 10, [0]), ("listed", 10, [0])],
)
def test_estimates_are_those_of_the_union_of_the_samples(data, batches, taken, mine):
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
    assert "Batches: 4, samples: 21." in out
    assert out.splitlines()[-1] == str(Path("rgd_noise.png").resolve())
    assert imread("rgd_noise.png").shape[1] == 1200


def test_the_reduction_of_the_criterion_does_not_matter(mine, capsys):
    assert run(mine) == 0
    mean = capsys.readouterr().out
    assert run(mine, "loader", "--loss", f"{mine}:summed") == 0
    assert capsys.readouterr().out == mean


def test_samples_whose_backward_reaches_nothing_have_gradients_of_zero(mine):
    model = resolve.make(f"{mine}:partly", torch.nn.Module, "a model")
    loss = resolve.make(f"{mine}:WithOwnWeight", torch.nn.Module, "a criterion")
    loader = resolve.make(f"{mine}:loader", list, "a loader")
    x, y = loader[0]
    rows = per_sample_gradients(model.layer, lambda output: loss(output, y), [x])
    rows = torch.cat([rows, rows.new_zeros(5 + 1 + 7, rows.shape[1])])
    for order in (loader, loader[::-1]):
        found = measurement.measure(model, loss, order, 10)
        assert sum(found.batch_sizes) == 21
        assert found.rows[0].trace == pytest.approx(rows.var(0, correction=1).sum().item(), rel=1e-9)
    with pytest.raises(ValueError, match="no backward has reached a parameter of the model"):
        measurement.measure(model, loss, loader[1:], 10)


@pytest.mark.filterwarnings("ignore:the per-sample gradients of 'Root'")
def test_gradients_that_are_not_finite_are_one_line(mine, capsys):
    assert main(["noise", f"{mine}:Root", "--data", f"{mine}:loader"]) == 1
    assert "the gradient of parameter 'raw' is not finite: look at" in capsys.readouterr().err


def test_names_are_shown_as_they_are(mine, capsys):
    assert main(["noise", f"{mine}:unusual", "--data", f"{mine}:loader"]) == 0
    assert "$x^$" in capsys.readouterr().out
    assert Path("rgd_noise.png").exists()


def test_identical_samples_have_no_noise(mine, capsys):
    assert run(mine, "same") == 0
    model, *_ = cells(capsys.readouterr().out)
    assert float(model[3]) < 1e-12
    assert Path("rgd_noise.png").exists()


def rows_of(layers):
    """Rows as those of a model with a parameter of its own and so many layers with two each."""

    def row(name, is_module, trace=1.0):
        return measurement.Row(name, is_module, 1, trace, 2.0)

    rows = [row("", True, 1.0 + 2 * layers), row("token", False)]
    for i in range(layers):
        rows += [row(f"body.{i}", True, 2.0), row(f"body.{i}.weight", False), row(f"body.{i}.bias", False)]
    return rows


def test_many_parameters_are_drawn_by_layer_each_once():
    few = rows_of(figure.MOST_PARAMETERS // 2 - 1)
    assert figure._shown(few) == [row for row in few if not row.is_module]
    many = rows_of(figure.MOST_PARAMETERS // 2)
    shown = figure._shown(many)
    assert [row.name for row in shown] == ["(model)", *(row.name for row in many[1:] if row.is_module)]
    assert sum(row.trace for row in shown) == many[0].trace
    assert shown[1][2:] == (2, 2.0, 4.0)


@pytest.mark.parametrize(
    ("scales", "batch_size"), [([1e-3, 5], 512), ([1e4, 2e6], 8), ([None, None], 16), ([0, 0], 4)], ids=str
)
def test_axes_show_all_bars_and_lines(scales, batch_size, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: seen.append(self))
    rows = [
        measurement.Row(f"p{i}", False, 1, 1.0 if scale is None else scale, -1.0 if scale is None else 1.0)
        for i, scale in enumerate(scales)
    ]
    figure.draw(measurement.Noise([figure._sum("", rows), *rows], [batch_size]), tmp_path / "noise.png")
    (left, _) = seen[0].axes
    low, high = left.get_xlim()
    values = [batch_size, *(scale for scale in scales if scale)]
    assert low < high
    assert all(low < value < high for value in values)
    for line in left.get_lines():
        assert low < line.get_xdata()[0] < high
    hidden = [text.get_text().strip() for text in left.texts]
    assert hidden == ["noise hides the gradient"] * scales.count(None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("single", "the data has 1 samples, which show no noise"),
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
