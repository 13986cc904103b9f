"""The `plot` command: the figure of a training that `Monitor` recorded."""

import math
import os
from functools import partial

import numpy as np
import pytest
from matplotlib.image import imread
from monitoring import HEADER, backward, write

import rgd_ext
from rgd_ext import monitor
from rgd_ext.__main__ import main
from rgd_ext.commands.plot import figure


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.csv"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lacks the columns step, "),
        ("step,loss\n0,1\n", "lacks the columns batch_size, epsilon"),
        (HEADER.rstrip("\n"), "lacks the columns step, "),
        (HEADER, "holds no row yet"),
        (HEADER + "0,1", "holds no row yet"),
        (HEADER + "0,1\n", "line 2 of .* is damaged, '0,1': delete it"),
        (HEADER + "x" + ",1" * 16 + "\n", "line 2 of .* is damaged"),
        ("\0\xff\n", "lacks the columns step, "),
    ],
)
def test_files_that_cannot_be_plotted_say_why(content, message, path, capsys):
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        monitor.read(path)
    assert main(["plot", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not path.with_suffix(".png").exists()


def test_missing_file_is_one_line(path, capsys):
    assert main(["plot", str(path)]) == 1
    assert "No such file" in capsys.readouterr().err


CLIPPED = partial(rgd_ext.precondition, weights=rgd_ext.weights.Clip(1e-6))


@pytest.mark.parametrize(("capture", "panels"), [(rgd_ext.observe, 3), (CLIPPED, 5)], ids=["observed", "clipped"])
def test_plot_leaves_out_panels_that_say_nothing(capture, panels, model, path):
    with capture(model) as handle, rgd_ext.Monitor(handle, path) as record:
        record.log(backward(model))
    assert main(["plot", str(path)]) == 0
    assert imread(path.with_suffix(".png")).shape[:2] == (panels * 336, 1080)


@pytest.mark.parametrize("steps", [1, 60])
@pytest.mark.parametrize("policy", [rgd_ext.Spectral(0.5), rgd_ext.Spectral(-0.5), rgd_ext.Trace(0.5)], ids=str)
def test_plot_draws_what_there_is(policy, steps, model, path, capsys):
    with rgd_ext.precondition(model, epsilon=policy) as handle, rgd_ext.Monitor(handle, path) as record:
        for _ in range(steps):
            record.log(backward(model))
    with path.open("a") as file:
        file.write("7,1.")
    assert main(["plot", str(path)]) == 0
    output = path.with_suffix(".png")
    assert capsys.readouterr().out == f"{output.resolve()}\n"
    assert imread(output).shape[:2] == (6 * 336, 1080)


def test_plot_of_identical_samples_without_loss(path, tmp_path):
    zeros = dict.fromkeys(("epsilon", "lambda_max", "trace", "rayleigh"), 0)
    write(path, 0, 1, loss="", **zeros)
    figure.draw(monitor.read(path), tmp_path / "x.png")


def test_long_run_is_drawn_by_medians(path, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure, "_loss", lambda axes, run: drawn.append(run))
    write(path, *range(2 * figure.POINTS + 1), loss=math.inf)
    figure.draw(monitor.read(path), tmp_path / "x.png")
    steps = drawn[0]["step"].tolist()
    assert (len(steps), steps[:2], steps[-1]) == (334, [1, 4], 2 * figure.POINTS - 0.5)
    write(path, *range(figure.POINTS))
    figure.draw(monitor.read(path), tmp_path / "x.png")
    assert drawn[1]["step"].tolist() == list(range(figure.POINTS))


def test_bounds_that_hold_in_every_step_hold_in_a_long_run_as_drawn(path, tmp_path, monkeypatch):
    largest = np.exp(np.random.default_rng(0).normal(size=4 * figure.POINTS))
    largest[5] = 0  # D = 0 in one step
    epsilon = np.where(largest > 0, -0.5 / np.where(largest > 0, largest, 1), 0)
    batch_size = np.where(np.arange(len(largest)) % 3, 8, 64)
    columns = {"epsilon": epsilon, "lambda_max": largest, "batch_size": batch_size, "effective_sample_size": batch_size}
    drawn, line = {}, figure._line

    def record(axes, run, values, label, colour):
        drawn[label] = values
        line(axes, run, values, label, colour)

    monkeypatch.setattr(figure, "_line", record)
    write(path, *range(len(largest)))
    figure.draw(monitor.read(path) | columns, tmp_path / "x.png")
    bound = drawn[r"$1 / \lambda_{\max}(D)$"]
    np.testing.assert_allclose(drawn[r"$|\epsilon|$"][2:], bound[2:] / 2)
    assert np.isfinite(bound).all()
    assert (drawn["effective sample\nsize / B"] == 1).all()


def test_plot_goes_where_it_is_told(path, tmp_path):
    write(path, 0, 1)
    assert main(["plot", str(path), "--out", str(tmp_path / "other.png")]) == 0
    assert sorted(os.listdir(tmp_path)) == ["other.png", "run.csv"]
